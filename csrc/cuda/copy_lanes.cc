#include "cuda/copy_lanes.h"

#include <chrono>
#include <exception>

#include "cuda/cuda_error.h"
#include "cuda/relaxed_capture.h"

namespace expertflow::cuda {
namespace {

using Clock = std::chrono::steady_clock;

// A lane that runs out of work keeps looking for more, so that a layer's misses start at once: to
// wake a sleeping thread takes tens of microseconds.
constexpr auto kSpinTime = std::chrono::milliseconds(2);

size_t NumLanes(const ExpertSource& source, int32_t num_threads) {
  return CopyLanes::DirectSource(source) != nullptr ? 1 : static_cast<size_t>(num_threads);
}

}  // namespace

const PinnedPool* CopyLanes::DirectSource(const ExpertSource& source) {
  const auto* pool = dynamic_cast<const PinnedPool*>(&source);
  return pool != nullptr && pool->is_pinned() ? pool : nullptr;
}

int32_t CopyLanes::MaxChunksInFlight(const ExpertSource& source, int32_t num_threads) {
  return static_cast<int32_t>(kDepth * NumLanes(source, num_threads));
}

CopyLanes::CopyLanes(SharedControl& shared, const SlotUses& uses, const ExpertSource& source,
                     const Slots& slots, int32_t num_threads, size_t chunk_bytes)
    : shared_(shared),
      uses_(uses),
      source_(source),
      pinned_pool_(DirectSource(source)),
      slots_(slots),
      arrivals_(static_cast<size_t>(slots.num_slots)),
      progress_(std::make_unique<SlotProgress[]>(static_cast<size_t>(slots.num_slots))) {
  EXPERTFLOW_CUDA_CHECK(cudaGetDevice(&device_));
  try {
    Start(NumLanes(source, num_threads), chunk_bytes);
  } catch (...) {  // the system has no more memory or threads
    Stop();
    throw;
  }
}

CopyLanes::~CopyLanes() { Stop(); }

void CopyLanes::Start(size_t count, size_t chunk_bytes) {
  if (pinned_pool_ == nullptr) staging_.emplace(count * kDepth * chunk_bytes);
  for (size_t i = 0; i < count; ++i) {
    Lane& lane = *lanes_.emplace_back(std::make_unique<Lane>());
    for (size_t place = 0; place < kDepth && staging_; ++place) {
      lane.staging[place] = staging_->data() + (i * kDepth + place) * chunk_bytes;
    }
  }
  for (const std::unique_ptr<Lane>& lane : lanes_) {
    lane->thread = std::thread([this, &lane = *lane] { RunLane(lane); });
  }
}

void CopyLanes::Stop() {
  {
    const SharedControl::Lock lock = shared_.Acquire();
    stopping_ = true;
    NotifyPosted();
  }
  for (const std::unique_ptr<Lane>& lane : lanes_) {
    if (lane->thread.joinable()) lane->thread.join();
  }
}

void CopyLanes::NotifyPosted() {
  num_posts_.fetch_add(1, std::memory_order_release);
  work_posted_.notify_all();
}

bool CopyLanes::IsSubmitted(SlotId slot, Generation generation) const {
  return progress(slot).submitted.load(std::memory_order_acquire) == generation;
}

void CopyLanes::AwaitSubmitted(SlotId slot, Generation generation) const {
  while (!IsSubmitted(slot, generation)) Pause();
}

void CopyLanes::AwaitEnded(SlotId slot, Generation generation) const {
  while (progress(slot).ended.load(std::memory_order_acquire) != generation) Pause();
}

void CopyLanes::MakeWait(SlotId slot, cudaStream_t stream) const {
  arrivals_[static_cast<size_t>(Index(slot))].MakeWait(stream);
}

void CopyLanes::RunLane(Lane& lane) {
  static_cast<void>(cudaSetDevice(device_));  // it was current before: cannot fail now
  const RelaxedCapture relaxed;
  std::vector<Flight> flights;  // oldest first
  flights.reserve(kDepth);
  bool look_for_chunk = true;
  for (size_t place = 0;;) {
    const uint64_t num_posts = num_posts_.load(std::memory_order_acquire);
    if (flights.size() < kDepth && look_for_chunk) {
      SlotUses::Use use = 0;
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

bool CopyLanes::AwaitPost(uint64_t num_posts) {
  const auto posted = [&] { return num_posts_.load(std::memory_order_acquire) != num_posts; };
  const auto give_up = Clock::now() + kSpinTime;
  while (!posted() && Clock::now() < give_up) Pause();
  SharedControl::Lock lock = shared_.Acquire();
  work_posted_.wait(lock, [&] { return stopping_ || posted(); });
  return !stopping_;
}

std::optional<Chunk> CopyLanes::TakeChunk(SlotUses::Use& use) {
  const SharedControl::Lock lock = shared_.Acquire();
  if (stopping_) return std::nullopt;
  const std::optional<Chunk> chunk = shared_.control.NextChunk();
  if (!chunk) return std::nullopt;
  use = uses_.Of(chunk->slot);
  SlotProgress& of_slot = progress(chunk->slot);
  if (chunk->offset_bytes == 0) {
    of_slot.generation = shared_.control.table().slot_generation[Index(chunk->slot)];
    of_slot.submitted_bytes = 0;
  }
  return chunk;
}

bool CopyLanes::Submit(Lane& lane, const Flight& flight, SlotUses::Use use) {
  const Chunk& chunk = flight.chunk;
  try {
    const std::byte* from = lane.staging[flight.place];
    if (pinned_pool_ != nullptr) {
      from = pinned_pool_->expert_data(chunk.expert) + chunk.offset_bytes;
    } else {
      source_.Read(chunk.expert, chunk.offset_bytes, {lane.staging[flight.place], chunk.num_bytes});
    }
    std::byte* to = slots_.data + static_cast<size_t>(Index(chunk.slot)) * slots_.slot_bytes +
                    chunk.offset_bytes;
    const cudaStream_t stream = copy_stream_.get();
    // What read the slot's last expert must have ended. Of several lanes any may be the first to
    // submit a chunk of the transfer; one lane alone submits them in order.
    if (chunk.offset_bytes == 0 || lanes_.size() > 1) uses_.MakeWait(use, stream);
    EXPERTFLOW_CUDA_CHECK(
        cudaMemcpyAsync(to, from, chunk.num_bytes, cudaMemcpyHostToDevice, stream),
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

void CopyLanes::NoteSubmitted(const Chunk& chunk) {
  const SharedControl::Lock lock = shared_.Acquire();
  SlotProgress& of_slot = progress(chunk.slot);
  of_slot.submitted_bytes += chunk.num_bytes;
  if (of_slot.submitted_bytes < slots_.slot_bytes) return;
  // Recorded only now, so that it comes after the chunks of every lane.
  arrivals_[static_cast<size_t>(Index(chunk.slot))].Record(copy_stream_.get());
  of_slot.submitted.store(of_slot.generation, std::memory_order_release);
}

bool CopyLanes::FinishIfCopied(const Lane& lane, const Flight& flight) {
  std::optional<std::string> error;
  try {
    if (!lane.copied[flight.place].IsDone()) return false;
  } catch (const CudaError& e) {
    error = e.what();
  }
  Finish(flight, error);
  return true;
}

void CopyLanes::Finish(const Flight& flight, const std::optional<std::string>& error) {
  const Chunk& chunk = flight.chunk;
  const double end_us = NowUs();
  const SharedControl::Lock lock = shared_.Acquire();
  if (!error) shared_.bandwidth.Record(chunk.num_bytes, flight.begin_us, end_us);
  shared_.control.FinishChunk(chunk, error);
  if (InFlight(shared_.control.table().slot_state[Index(chunk.slot)])) return;
  SlotProgress& of_slot = progress(chunk.slot);
  of_slot.submitted.store(of_slot.generation, std::memory_order_release);
  of_slot.ended.store(of_slot.generation, std::memory_order_release);
}

}  // namespace expertflow::cuda
