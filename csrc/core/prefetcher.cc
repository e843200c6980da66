#include "core/prefetcher.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "core/prefetch_trial.h"

namespace expertflow {

Prefetcher::Prefetcher(const SlotTableView& table, Planner& planner, TransferQueue& queue,
                       const PlannerConfig& config, Trial trial)
    : table_(table),
      planner_(planner),
      queue_(queue),
      top_k_(config.top_k),
      expert_bytes_(config.expert_bytes),
      keeps_experts_(config.policy != PolicyKind::kOnDemand),
      scheduler_({.max_horizon = kMaxHorizon,
                  .max_fetched = std::min(table.num_experts, config.top_k * kMaxDecodeTokens),
                  .expert_bytes = config.expert_bytes}),
      ledger_(table),
      backlog_(table, queue, config.expert_bytes),
      miss_costs_(table.num_layers),
      pays_(trial == kUntried) {
  set_horizon(kAutoHorizon);
  const size_t num_predictions = size_t{kMaxHorizon} * static_cast<size_t>(table.num_experts);
  ranked_.reserve(num_predictions);
  expected_.reserve(num_predictions);
  if (trial == kUntried || !keeps_experts_) return;
  trial_ = std::make_unique<PrefetchTrial>(table, planner, queue, config);
  routed_.reserve(static_cast<size_t>(table.num_experts));
}

Prefetcher::~Prefetcher() = default;

void Prefetcher::set_horizon(int32_t horizon) {
  if (horizon < kAutoHorizon || horizon > kMaxHorizon) {
    throw std::invalid_argument("horizon must be auto or 0 to " + std::to_string(kMaxHorizon) +
                                ", not " + std::to_string(horizon));
  }
  chosen_horizon_ = keeps_experts_ ? horizon : 0;
  if (trial_) trial_->Interrupt();
  ClearBiases();  // what misses cost was learned with the horizon before
}

void Prefetcher::ClearBiases() {
  measured_layer_ = -1;
  for (int32_t layer = 0; layer < table_.num_layers; ++layer) planner_.set_layer_bias(layer, 0);
}

void Prefetcher::Restart() {
  ledger_ = PrefetchLedger(table_);
  counts_ = {};
  horizon_ = 0;
  measured_layer_ = -1;
}

void Prefetcher::RecordPlan(const Plan& plan) {
  layer_ = plan.layer;
  tick_ = plan.tick;
  is_streaming_ = plan.streaming;
  ledger_.RecordPlan(plan);
  const PrefetchLedger::Counts counts = ledger_.TakeCounts();
  num_fetched_ = static_cast<int32_t>(plan.rows.size()) - plan.num_hits + counts.ready;
  counts_.used += counts.used;
  counts_.wasted += counts.wasted;
  counts_.regretted += counts.regretted;
  statistics_.hits += counts.ready;
  statistics_.used += counts.used;
  statistics_.wasted += counts.wasted;
  if (!trial_) return;
  routed_.clear();
  for (const PlanRow& row : plan.rows) routed_.push_back(row.expert);
}

int32_t Prefetcher::BeginLayer(LayerObservation measured) {
  if (is_fixed() || is_streaming_) return BeginUnmeasuredLayer();
  if (trial_) FollowTrial(measured);
  const PrefetchLedger::Counts counts = std::exchange(counts_, {});
  if (!pays_) {
    horizon_ = 0;
    return trial_->horizon();
  }
  LearnMissCost(measured);
  measured.num_fetched = num_fetched_;
  measured.num_prefetch_used = counts.used;
  measured.num_prefetch_wasted = counts.wasted;
  measured.num_prefetch_regretted = counts.regretted;
  measured.queued_bytes = static_cast<double>(backlog_.settled_bytes());
  horizon_ = scheduler_.BeginLayer(measured);
  return trial_ ? std::max(horizon_, trial_->horizon()) : horizon_;
}

void Prefetcher::FollowTrial(const LayerObservation& measured) {
  trial_->BeginLayer(layer_, tick_, routed_, measured);
  if (trial_->pays() == pays_) return;
  pays_ = trial_->pays();
  ClearBiases();
  if (!pays_) return;
  scheduler_ = trial_->prefetcher().scheduler_;
  miss_costs_ = trial_->prefetcher().miss_costs_;
}

void Prefetcher::LearnMissCost(const LayerObservation& measured) {
  if (measured_layer_ >= 0 && scheduler_.transfer_us() > 0.0) {
    miss_costs_.Record(measured_layer_, measured.stall_us, measured_num_fetched_,
                       scheduler_.transfer_us());
    // Without prefetch every miss costs a transfer.
    const bool is_on = scheduler_.horizon() > 0;
    planner_.set_layer_bias(measured_layer_, is_on ? miss_costs_.bias(measured_layer_) : 0);
  }
  measured_layer_ = layer_;
  measured_num_fetched_ = num_fetched_;
}

int32_t Prefetcher::BeginUnmeasuredLayer() {
  counts_ = {};
  measured_layer_ = -1;
  if (trial_) trial_->Interrupt();
  // A prompt keeps the link busy with what it needs, and takes few slots: there is no room.
  if (is_streaming_) return horizon_ = 0;
  if (is_fixed()) return horizon_ = chosen_horizon_;
  return horizon_ = pays_ ? scheduler_.horizon() : 0;
}

// As if the last layer of the token before were planned anew.
int32_t Prefetcher::BeginToken(int32_t num_tokens, double compute_us) {
  layer_ = table_.num_layers - 1;
  is_streaming_ = num_tokens > kMaxDecodeTokens;
  if (is_streaming_) return horizon_ = 0;
  if (is_fixed()) return horizon_ = chosen_horizon_;
  horizon_ = 0;
  if (compute_us <= 0.0) return 0;
  if (pays_) horizon_ = scheduler_.BeginToken(compute_us);
  return trial_ ? std::max(horizon_, trial_->BeginToken(compute_us)) : horizon_;
}

int32_t Prefetcher::Prefetch(std::vector<Prediction>& predictions, const Post& post) {
  if (trial_) trial_->Prefetch(predictions);
  return PrefetchRanked(predictions, post);
}

int32_t Prefetcher::PrefetchRanked(std::vector<Prediction>& predictions, const Post& post) {
  if (horizon_ == 0) return 0;  // what waits stays: a caller need not predict, nor come here
  std::erase_if(predictions, [this](const Prediction& p) { return p.distance > horizon_; });
  if (is_fixed()) {
    KeepTopK(predictions);
    ProtectExpected(predictions);
  } else {
    std::ranges::sort(predictions, [](const Prediction& a, const Prediction& b) {
      return std::tuple(-a.need, a.distance, a.expert) < std::tuple(-b.need, b.distance, b.expert);
    });
    ProtectExpected(predictions);
    DecideAnew(predictions);
  }
  int32_t num_posted = 0;
  for (const Prediction& p : predictions) {
    SlotId slot = Take(ExpertOf(p), NeededAt(p));
    if (slot == SlotId::kNone && MakeRoomFor(p)) slot = Take(ExpertOf(p), NeededAt(p));
    if (slot == SlotId::kNone) continue;
    post(slot, NeededAt(p));
    if (!is_fixed()) backlog_.Add(slot, NeededAt(p));
    ++num_posted;
  }
  return num_posted;
}

// So that no prefetch takes the slot of what is expected, too.
void Prefetcher::ProtectExpected(std::span<const Prediction> predictions) {
  expected_.clear();
  for (const Prediction& p : predictions) {
    if (SlotOf(p) == SlotId::kNone || !IsExpected(p)) continue;
    Take(ExpertOf(p), NeededAt(p));
    expected_.push_back(p);
  }
}

// Where a small cache holds nothing but what is expected: ends the protection of what is expected
// least, if what `prediction` is above that is worth a transfer. Returns whether there is such.
bool Prefetcher::MakeRoomFor(const Prediction& prediction) {
  if (is_fixed()) return false;
  for (size_t i = expected_.size(); i-- > 0;) {
    const Prediction& least = expected_[i];
    Prediction more = prediction;
    more.need -= least.need;
    if (!scheduler_.Expects(more)) return false;
    if (!planner_.Unprotect(ExpertOf(least), tick_, ExpertOf(prediction))) continue;
    expected_.erase(expected_.begin() + static_cast<ptrdiff_t>(i));
    return true;
  }
  return false;
}

// Leaves those of `ranked` that are to be posted, and gives up what was posted before and is not
// admitted beside them.
void Prefetcher::DecideAnew(std::vector<Prediction>& ranked) {
  backlog_.Reopen(tick_);
  std::erase_if(ranked, [this](const Prediction& p) {
    const SlotId slot = SlotOf(p);
    const bool is_resident = slot != SlotId::kNone;
    if (is_resident && !backlog_.IsUndecided(slot, NeededAt(p))) return true;
    if (!IsExpected(p) || !IsWanted(p, is_resident ? queue_.left_bytes(slot) : expert_bytes_)) {
      return true;
    }
    if (is_resident) {
      backlog_.Keep(slot, p.distance);
      queue_.Reschedule(slot, NeededAt(p));
    } else {
      backlog_.Admit(p.distance);
    }
    return is_resident;
  });
  backlog_.EndUndecided([this](SlotId slot, Tick needed_at) { return GiveUp(slot, needed_at); });
}

// What has not begun is taken back, without a trace. What has begun has lost what was in its slot,
// and goes on while the link has nothing better to do, until its layer has passed.
bool Prefetcher::GiveUp(SlotId slot, Tick needed_at) {
  if (queue_.IsWaitingPrefetch(slot)) {
    queue_.Cancel(slot);
    planner_.Withdraw(slot);
    ledger_.RecordWithdrawal(slot);
    return true;
  }
  if (needed_at <= tick_ && !queue_.HasChunksOut(slot)) {
    queue_.Cancel(slot);
    planner_.Drop(slot, queue_.copied_bytes(slot));
    ledger_.RecordDrop(slot);
    return true;
  }
  queue_.Reschedule(slot, tick_ + kMaxHorizon + 1);
  return false;
}

int32_t Prefetcher::PrefetchNeeded(std::span<const float> need, const Post& post) {
  const auto num_experts = static_cast<size_t>(table_.num_experts);
  if (need.size() % num_experts != 0) {
    throw std::invalid_argument("need must be [distances, " + std::to_string(num_experts) + "]");
  }
  if (trial_) trial_->PrefetchNeeded(need);
  const auto num_distances = std::min(need.size() / num_experts, static_cast<size_t>(horizon_));
  ranked_.clear();
  for (size_t row = 0; row < num_distances; ++row) {
    RankRow(static_cast<int32_t>(row) + 1, need.subspan(row * num_experts, num_experts));
  }
  return PrefetchRanked(ranked_, post);
}

// What is not even expected would not be admitted either.
void Prefetcher::RankRow(int32_t distance, std::span<const float> need) {
  const auto first = std::ssize(ranked_);
  for (int32_t expert = 0; expert < table_.num_experts; ++expert) {
    const Prediction prediction{distance, expert, need[static_cast<size_t>(expert)]};
    if (prediction.need > 0.0F && IsExpected(prediction)) ranked_.push_back(prediction);
  }
  if (!is_fixed()) return;  // they are ranked with those of the other layers
  const auto begin = ranked_.begin() + first;
  const auto end = begin + std::min<ptrdiff_t>(ranked_.end() - begin, top_k_);
  std::partial_sort(begin, end, ranked_.end(), [](const Prediction& a, const Prediction& b) {
    return a.need != b.need ? a.need > b.need : a.expert < b.expert;
  });
}

SlotId Prefetcher::Take(ExpertId expert, Tick needed_at) {
  const SlotId slot = planner_.PlanPrefetch(expert, tick_, needed_at);
  if (slot != SlotId::kNone) ledger_.RecordPrefetch(slot, expert, tick_);
  return slot;
}

ExpertId Prefetcher::ExpertOf(const Prediction& prediction) const {
  return {(layer_ + prediction.distance) % table_.num_layers, prediction.expert};
}

SlotId Prefetcher::SlotOf(const Prediction& prediction) const {
  return table_.expert_slot[Index(ToIndex(table_, ExpertOf(prediction)))];
}

bool Prefetcher::IsExpected(const Prediction& prediction) const {
  return is_fixed() || scheduler_.Expects(prediction);
}

bool Prefetcher::IsWanted(const Prediction& prediction, size_t num_bytes) const {
  const size_t bytes_ahead = backlog_.bytes_until(prediction.distance);
  return scheduler_.Admits(prediction, num_bytes, bytes_ahead) &&
         !DelaysLaterOnes(prediction, num_bytes, bytes_ahead);
}

// The queue serves the earliest need first, so whatever it takes in late must leave time for what
// was thought more probable and is needed later.
bool Prefetcher::DelaysLaterOnes(const Prediction& prediction, size_t num_bytes,
                                 size_t bytes_ahead) const {
  for (int32_t d = prediction.distance + 1; d <= horizon_; ++d) {
    const size_t bytes = backlog_.bytes_until(d);
    if (bytes > bytes_ahead && !scheduler_.HasTimeFor(bytes + num_bytes, d)) return true;
  }
  return false;
}

// A fixed horizon knows no need: it takes as many experts of each layer as a token uses.
void Prefetcher::KeepTopK(std::vector<Prediction>& predictions) const {
  int32_t distance = 0;
  int32_t place = 0;
  std::erase_if(predictions, [&](const Prediction& prediction) {
    place = prediction.distance == distance ? place + 1 : 0;
    distance = prediction.distance;
    return place >= top_k_;
  });
}

}  // namespace expertflow
