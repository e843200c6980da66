#pragma once

#include <stdexcept>
#include <string>

#include "core/ids.h"

namespace expertflow {

// An expert could not be brought into the cache. The cache is consistent: the expert is missing and
// can be asked for again.
class TransferError : public std::runtime_error {
 public:
  TransferError(ExpertId expert, const std::string& cause)
      : std::runtime_error("cannot load expert " + std::to_string(expert.expert) +
                           " of MoE layer " + std::to_string(expert.layer) + ": " + cause) {}
};

}  // namespace expertflow
