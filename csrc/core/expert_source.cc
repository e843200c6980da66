#include "core/expert_source.h"

#include <stdexcept>
#include <string>

namespace expertflow {
namespace {

std::string Describe(size_t num_experts, size_t expert_bytes) {
  return std::to_string(num_experts) + " experts of " + std::to_string(expert_bytes) + " bytes";
}

}  // namespace

void CheckHolds(const ExpertSource& source, size_t num_experts, size_t expert_bytes) {
  if (source.num_experts() == num_experts && source.expert_bytes() == expert_bytes) return;
  throw std::invalid_argument("the source holds " +
                              Describe(source.num_experts(), source.expert_bytes()) + ", not " +
                              Describe(num_experts, expert_bytes));
}

}  // namespace expertflow
