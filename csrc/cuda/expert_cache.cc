#include "cuda/expert_cache.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <stdexcept>
#include <utility>

#include "cuda/cuda_error.h"
#include "cuda/device_guard.h"
#include "cuda/relaxed_capture.h"
#include "host/fork.h"

namespace expertflow::cuda {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kNumUses = 64;
constexpr int kMaxLockSpins = 2000;
// A lane that runs out of work keeps looking for more, so that a layer's misses start at once: to
// wake a sleeping thread takes tens of microseconds.
constexpr auto kSpinTime = std::chrono::milliseconds(2);

double NowUs() {
  return std::chrono::duration<double, std::micro>(Clock::now().time_since_epoch()).count();
}

// A demanded expert is one copy if it can be: gaps between copies cost 3 us each.
constexpr size_t kDemandChunkBytes = size_t{24} << 20;

// Leaves the core to its other hyperthread for a moment, but not to the scheduler.
void Pause() {
  for (int i = 0; i < 16; ++i) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

// A pinned pool needs no staging memory, so its demands may be large.
ExpertCacheOptions WithDemandChunks(ExpertCacheOptions options, bool is_pinned) {
  if (is_pinned) options.demand_chunk_bytes = kDemandChunkBytes;
  return options;
}

const PinnedPool* DirectSource(const ExpertSource& source) {
  const auto* pool = dynamic_cast<const PinnedPool*>(&source);
  return pool != nullptr && pool->is_pinned() ? pool : nullptr;
}

void RefuseCapture(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  EXPERTFLOW_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  if (status == cudaStreamCaptureStatusNone) return;
  throw std::logic_error(
      "streamed experts cannot be captured in a CUDA graph: the host reads which experts are "
      "missing. Capture the parts of the model between the experts");
}

}  // namespace

ExpertCache::ExpertCache(std::shared_ptr<const ExpertSource> source, const ExpertLayout& layout,
                         const ExpertCacheOptions& options, int device,
                         const std::optional<ExpertMlpShape>& mlp)
    : source_(std::move(source)),
      pinned_pool_(DirectSource(*source_)),
      num_lanes_(pinned_pool_ != nullptr ? 1 : options.num_threads),
      layout_(layout),
      slot_bytes_(layout.slot_bytes()),
      device_number_(device),
      fork_generation_(ForkGeneration()),
      progress_(
          std::make_unique<SlotProgress[]>(static_cast<size_t>(std::max(options.num_slots, 0)))),
      control_(WithDemandChunks(options, pinned_pool_ != nullptr),
               static_cast<int32_t>(kDepth) * std::max(num_lanes_, 1)) {
  if (options.num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  const int32_t num_experts_total = options.num_layers * options.num_experts;
  CheckHolds(*source_, static_cast<size_t>(num_experts_total), slot_bytes_);

  const DeviceGuard guard(device);
  const auto num_slots = static_cast<size_t>(options.num_slots);
  device_ = std::make_unique<Device>();
  device_->slots = DeviceMemory(num_slots * slot_bytes_,
                                "an expert cache of " + std::to_string(num_slots) + " slots");
  if (mlp) device_->mlp.emplace(*mlp);
  device_->arrivals.resize(num_slots);
  device_->uses.resize(kNumUses);
  try {
    StartLanes(AlignUp(options.chunk_bytes, kSlotAlignment));
    if (options.num_slots == num_experts_total && options.planner.policy != PolicyKind::kOnDemand) {
      LoadAll();
    }
  } catch (...) {
    StopLanes();
    throw;
  }
}

ExpertCache::Lock ExpertCache::Acquire() const {
  Lock lock(mutex_, std::try_to_lock);
  for (int i = 0; !lock && i < kMaxLockSpins; ++i) {
    Pause();
    static_cast<void>(lock.try_lock());
  }
  if (!lock) lock.lock();  // whoever holds it was put to sleep
  return lock;
}

ExpertCache::~ExpertCache() {
  if (ForkGeneration() != fork_generation_) {
    // Neither the lanes nor the context of the device exist here.
    static_cast<void>(device_.release());
    return;
  }
  StopLanes();
  try {
    const DeviceGuard guard(device_number_);
    device_.reset();  // freeing the slots waits for the work that reads them
  } catch (const CudaError&) {
    // The device is lost, and its memory with it.
    static_cast<void>(device_.release());
  }
}

void ExpertCache::StartLanes(size_t chunk_bytes) {
  const auto count = static_cast<size_t>(num_lanes_);
  if (pinned_pool_ == nullptr) device_->staging.emplace(count * kDepth * chunk_bytes);
  for (size_t i = 0; i < count; ++i) {
    Lane& lane = *device_->lanes.emplace_back(std::make_unique<Lane>());
    for (size_t place = 0; place < kDepth && device_->staging; ++place) {
      lane.staging[place] = device_->staging->data() + (i * kDepth + place) * chunk_bytes;
    }
    lane.thread = std::thread([this, &lane] { RunLane(lane); });
  }
}

void ExpertCache::StopLanes() {
  {
    const Lock lock = Acquire();
    stopping_ = true;
    NotifyPosted();
  }
  for (const std::unique_ptr<Lane>& lane : device_->lanes) {
    if (lane->thread.joinable()) lane->thread.join();
  }
}

void ExpertCache::LoadAll() {
  Lock lock = Acquire();
  control_.PostAll();
  NotifyPosted();
  while (control_.HasTransfers()) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    lock.lock();
  }
  control_.CheckAllResident();
  control_.ResetStatistics();
}

const Plan& ExpertCache::BeginLayer(int32_t layer, const int64_t* expert_ids, size_t num_ids,
                                    int32_t num_tokens, cudaStream_t stream) {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  RefuseCapture(stream);
  routed_ids_ = {};  // they are overwritten, whether or not this succeeds
  routed_ids_ = device_->readback.Read(expert_ids, num_ids, stream);
  Lock lock = Acquire();
  CollectStalls();
  RecordUses(plan_stream_);
  plan_stream_ = stream;
  const Plan* plan = control_.BeginLayer(layer, routed_ids_, num_tokens);
  if (plan == nullptr) {  // transfers hold every slot
    const double begin_us = NowUs();
    CancelAll(lock);
    control_.statistics()[static_cast<size_t>(layer)].stall_us += NowUs() - begin_us;
    plan = control_.BeginLayer(layer, routed_ids_, num_tokens);
  }
  NotifyPosted();
  return *plan;
}

void ExpertCache::CollectStalls() {
  device_->stalls.Collect([this](int32_t of_layer, double stall_us) {
    control_.statistics()[static_cast<size_t>(of_layer)].stall_us += stall_us;
  });
}

void ExpertCache::RecordUses(cudaStream_t stream) {
  if (control_.plan() == nullptr) return;
  const size_t use = RecordUse(stream);
  for (const PlanRow& row : control_.plan()->rows) progress(row.slot).use = use;
}

size_t ExpertCache::RecordUse(cudaStream_t stream) {
  const size_t index = next_use_++ % kNumUses;
  Use& use = device_->uses[index];
  // Slots may still refer to what the event stood for: it comes before what it stands for now.
  if (use.stream != stream) use.event.MakeWait(stream);
  use.event.Record(stream);
  use.stream = stream;
  return index;
}

void ExpertCache::Wait(int32_t row_index, cudaStream_t stream) {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  Lock lock = Acquire();
  if (control_.IsReady(row_index)) return;
  device_->stalls.Begin(stream, control_.plan()->layer);
  while (!control_.IsReady(row_index)) {
    const SlotId slot = control_.RowAt(row_index).slot;
    const Generation generation = control_.table().slot_generation[Index(slot)];
    const std::atomic<Generation>& submitted = progress(slot).submitted;
    if (submitted.load(std::memory_order_relaxed) == generation) {
      device_->arrivals[static_cast<size_t>(Index(slot))].MakeWait(stream);
      break;
    }
    lock.unlock();
    while (submitted.load(std::memory_order_acquire) != generation) Pause();
    lock = Acquire();
  }
  device_->stalls.End(stream);
}

void ExpertCache::Release(int32_t row_index, cudaStream_t stream) {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  Lock lock = Acquire();
  const PlanRow row = control_.RowAt(row_index);
  if (row.next_row == kNoRow) return;
  const Generation generation = control_.table().slot_generation[Index(row.slot)];
  while (!control_.IsReady(row_index)) {  // the queue takes a slot again only once it is idle
    lock.unlock();
    while (progress(row.slot).ended.load(std::memory_order_acquire) != generation) Pause();
    lock = Acquire();
  }
  progress(row.slot).use = RecordUse(stream);
  control_.Release(row_index);
  NotifyPosted();
}

int32_t ExpertCache::Prefetch(int32_t layer, std::span<const int64_t> expert_ids,
                              int32_t distance) {
  CheckSameProcess(fork_generation_);
  const Lock lock = Acquire();
  const int32_t num_posted = control_.Prefetch(layer, expert_ids, distance);
  if (num_posted > 0) NotifyPosted();
  return num_posted;
}

void ExpertCache::NotifyPosted() {
  num_posts_.fetch_add(1, std::memory_order_release);
  device_->work_posted.notify_all();
}

void ExpertCache::CancelAll(Lock& lock) {
  control_.CancelTransfers();
  while (control_.chunks_in_flight() > 0) {
    lock.unlock();
    Pause();
    lock.lock();
  }
}

void ExpertCache::RunLane(Lane& lane) {
  static_cast<void>(cudaSetDevice(device_number_));  // it was current before: cannot fail now
  const RelaxedCapture relaxed;
  std::vector<Flight> flights;  // oldest first
  flights.reserve(kDepth);
  bool look_for_chunk = true;
  for (size_t place = 0;;) {
    const uint64_t num_posts = num_posts_.load(std::memory_order_acquire);
    if (flights.size() < kDepth && look_for_chunk) {
      size_t use = 0;
      const std::optional<Chunk> chunk = TakeChunk(use);
      look_for_chunk = chunk.has_value();
      if (chunk) {
        const Flight flight{*chunk, place, NowUs()};
        if (Submit(lane, flight, use)) {
          flights.push_back(flight);
          place = (place + 1) % kDepth;
        }
        continue;
      }
    }
    if (flights.empty()) {
      if (!AwaitPost(num_posts)) return;
    } else if (FinishIfCopied(lane, flights.front())) {
      flights.erase(flights.begin());
      look_for_chunk = true;
    } else {
      Pause();
    }
    look_for_chunk |= num_posts != num_posts_.load(std::memory_order_acquire);
  }
}

bool ExpertCache::AwaitPost(uint64_t num_posts) {
  const auto posted = [&] { return num_posts_.load(std::memory_order_acquire) != num_posts; };
  const auto give_up = Clock::now() + kSpinTime;
  while (!posted() && Clock::now() < give_up) Pause();
  Lock lock = Acquire();
  device_->work_posted.wait(lock, [&] { return stopping_ || posted(); });
  return !stopping_;
}

std::optional<Chunk> ExpertCache::TakeChunk(size_t& use) {
  const Lock lock = Acquire();
  if (stopping_) return std::nullopt;
  const std::optional<Chunk> chunk = control_.NextChunk();
  if (!chunk) return std::nullopt;
  SlotProgress& of_slot = progress(chunk->slot);
  use = of_slot.use;
  if (chunk->offset_bytes == 0) {
    of_slot.generation = control_.table().slot_generation[Index(chunk->slot)];
    of_slot.submitted_bytes = 0;
  }
  return chunk;
}

bool ExpertCache::Submit(Lane& lane, const Flight& flight, size_t use) {
  const Chunk& chunk = flight.chunk;
  try {
    const std::byte* from = lane.staging[flight.place];
    if (pinned_pool_ != nullptr) {
      from = pinned_pool_->expert_data(chunk.expert) + chunk.offset_bytes;
    } else {
      source_->Read(chunk.expert, chunk.offset_bytes,
                    {lane.staging[flight.place], chunk.num_bytes});
    }
    const cudaStream_t stream = device_->copy_stream.get();
    // What read the slot's last expert must have ended. Of several lanes any may be the first to
    // submit a chunk of the transfer; one lane alone submits them in order.
    if (chunk.offset_bytes == 0 || num_lanes_ > 1) device_->uses[use].event.MakeWait(stream);
    EXPERTFLOW_CUDA_CHECK(cudaMemcpyAsync(slot_data(chunk.slot) + chunk.offset_bytes, from,
                                          chunk.num_bytes, cudaMemcpyHostToDevice, stream),
                          std::to_string(chunk.num_bytes) + " bytes of an expert");
    lane.copied[flight.place].Record(stream);
    NoteSubmitted(chunk);
    return true;
  } catch (const std::exception& error) {
    Finish(flight, error.what());
  } catch (...) {
    Finish(flight, "unknown error");
  }
  return false;
}

void ExpertCache::NoteSubmitted(const Chunk& chunk) {
  const Lock lock = Acquire();
  SlotProgress& of_slot = progress(chunk.slot);
  of_slot.submitted_bytes += chunk.num_bytes;
  if (of_slot.submitted_bytes < slot_bytes_) return;
  // Recorded only now, so that it comes after the chunks of every lane.
  device_->arrivals[static_cast<size_t>(Index(chunk.slot))].Record(device_->copy_stream.get());
  of_slot.submitted.store(of_slot.generation, std::memory_order_release);
}

bool ExpertCache::FinishIfCopied(const Lane& lane, const Flight& flight) {
  std::optional<std::string> error;
  try {
    if (!lane.copied[flight.place].IsDone()) return false;
  } catch (const CudaError& e) {
    error = e.what();
  }
  Finish(flight, error);
  return true;
}

void ExpertCache::Finish(const Flight& flight, const std::optional<std::string>& error) {
  const Chunk& chunk = flight.chunk;
  const double end_us = NowUs();
  const Lock lock = Acquire();
  if (!error) bandwidth_.Record(chunk.num_bytes, flight.begin_us, end_us);
  control_.FinishChunk(chunk, error);
  if (InFlight(control_.table().slot_state[Index(chunk.slot)])) return;
  SlotProgress& of_slot = progress(chunk.slot);
  of_slot.submitted.store(of_slot.generation, std::memory_order_release);
  of_slot.ended.store(of_slot.generation, std::memory_order_release);
}

std::vector<uint8_t> ExpertCache::Residents(int32_t layer) const {
  CheckSameProcess(fork_generation_);
  const Lock lock = Acquire();
  return control_.Residents(layer);
}

std::vector<LayerStatistics> ExpertCache::statistics() {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  const Lock lock = Acquire();
  CollectStalls();
  return control_.statistics();
}

void ExpertCache::ResetStatistics() {
  CheckSameProcess(fork_generation_);
  const DeviceGuard guard(device_number_);
  const Lock lock = Acquire();
  device_->stalls.Forget();
  control_.ResetStatistics();
}

double ExpertCache::bandwidth_bytes_per_second() const {
  CheckSameProcess(fork_generation_);
  const Lock lock = Acquire();
  return bandwidth_.bytes_per_second();
}

}  // namespace expertflow::cuda
