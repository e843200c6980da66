#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/slot_table.h"

namespace expertflow {

enum class PolicyKind : int32_t {
  kLru,
  kDecayedFrequency,
  kTwoLevelLru,
  kOnDemand,
  kPredictedNeed
};

// Which slots a layer may take: any, or its own equal share of them.
enum class CacheScope : int32_t { kGlobal, kLayer };

std::vector<std::string> PolicyNames();

// Throw std::invalid_argument that lists the names there are.
PolicyKind ParsePolicy(std::string_view name);
CacheScope ParseScope(std::string_view name);

// What the policies' per-slot functions need beside the table; plain data, passed to kernels by
// value.
struct EvictionParams {
  Tick protected_ticks;             // for so long a use protects: see ProtectedTicks
  int64_t decay_per_tick_q24;       // -log2 of the decay of use frequencies, 24 fraction bits
  const int32_t* log2_1p_exp2_q24;  // see eviction/decayed_frequency.h
};

// A token's worth of plans in a table that all layers share. Where each layer has its own slots, it
// is planned once a token: there a use would protect from prefetches only, which must take the slot
// that the demand they stand for would take.
inline Tick ProtectedTicks(CacheScope scope, int32_t num_layers) {
  return scope == CacheScope::kLayer ? 1 : num_layers;
}

// Added to the rank of a slot that goes only after all that are not protected.
constexpr int64_t kProtected = int64_t{1} << 62;

// What a slot is ranked by; plain values, so that a kernel reads them long before it ranks.
struct SlotUse {
  int64_t key;
  Tick needed;
  Tick predicted;
};

EXPERTFLOW_HD inline SlotUse UseOf(const SlotTableView& table, int32_t slot) {
  return {table.slot_key[slot], table.slot_needed[slot], table.slot_predicted[slot]};
}

// A policy is three functions, for host and device alike:
//   KeyOnUse     the key of an expert that is used at tick `now`, given its `expert_key` before; it
//                is not negative
//   IsProtected  whether a slot goes, at tick `now`, only after all that are not protected
//   Origin       a key near those of the experts in use at tick `now`: keys that lie within
//                2^(30 - kTieBits) of it are told apart in 32 bits (core/slot_order.h), others
//                with more work
// and kTieBits, of those 32 for slots of equal keys, if there are many.

// A slot's rank among the victims at tick `now`: the smallest goes first, ties go to the lower
// slot. It is the slot's key or above, so a scan reads little more than keys, and that of an empty
// slot is its key.
template <class Policy>
EXPERTFLOW_HD int64_t RankOf(const EvictionParams& params, const SlotUse& slot, Tick now) {
  return Policy::IsProtected(params, slot, now) ? slot.key + kProtected : slot.key;
}

}  // namespace expertflow
