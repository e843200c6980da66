#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/bandwidth_estimator.h"
#include "core/planner.h"
#include "core/slot_table.h"
#include "core/transfer_queue.h"

namespace expertflow {

// A link that carries one copy after the other.
struct LinkProfile {
  double bytes_per_second;  // may be infinite
  int64_t latency_ns;       // of each copy, during which it occupies the link
};

// The transfers of an expert cache under a virtual clock: the queue of the real one, with copies
// that take the time a link profile says. Times are nanoseconds since the start and never go back.
class VirtualTransfers {
 public:
  static constexpr int32_t kMaxChunksInFlight = 2;

  // Throws std::invalid_argument for a bandwidth that is not positive or a negative latency.
  VirtualTransfers(SlotTable& table, Planner& planner, size_t expert_bytes, size_t chunk_bytes,
                   size_t demand_chunk_bytes, const LinkProfile& link);

  // Queues the transfer of what `slot` was assigned to.
  void Post(SlotId slot, TransferClass transfer_class, Tick needed_at, int64_t now_ns);
  void Promote(SlotId slot, Tick needed_at) { queue_.Promote(slot, needed_at); }

  // Ends every copy that is over by then, and starts what follows it.
  void AdvanceTo(int64_t now_ns);

  // Returns when computation of `work_ns` that begins at `now_ns` is over, which takes longer by a
  // share of `copy_slowdown` while a copy is under way.
  int64_t EndOfCompute(int64_t now_ns, int64_t work_ns, double copy_slowdown);

  // Returns when the slot is ready, not before `now_ns`.
  int64_t WaitUntilReady(SlotId slot, int64_t now_ns);

  // Takes all transfers back and returns when the last copy in flight has ended.
  int64_t CancelAll(int64_t now_ns);

  // Copies that start later take the time that this link needs.
  void set_link(const LinkProfile& link);

  TransferQueue& queue() { return queue_; }
  double measured_bytes_per_second() const { return bandwidth_.bytes_per_second(); }
  size_t moved_bytes() const { return moved_bytes_; }  // of all copies that were started

 private:
  struct Copy {
    Chunk chunk;
    int64_t begin_ns;
    int64_t end_ns;
  };

  int64_t DurationNs(size_t num_bytes) const;
  void StartCopies(int64_t now_ns);
  void EndFirstCopy();

  SlotTableView table_;
  Planner& planner_;
  size_t expert_bytes_;
  LinkProfile link_;
  TransferQueue queue_;
  BandwidthEstimator bandwidth_;
  std::vector<Copy> copies_;  // in flight, in order
  int64_t link_free_ns_ = 0;
  size_t moved_bytes_ = 0;
};

}  // namespace expertflow
