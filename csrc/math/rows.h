// Where the recordings of a batch lie among its rows, for host and device.
#pragma once

#include <cstdint>

#include "math/host_device.h"

namespace d2net {

namespace math {

// lengths[recording] within [0, t]; t where there are no lengths.
D2NET_HD inline int64_t clamped_length(const int64_t* lengths, int64_t recording, int64_t t) {
  if (lengths == nullptr) return t;
  const int64_t length = lengths[recording];
  return length < 0 ? 0 : length > t ? t : length;
}

}  // namespace math

// Of a padded batch (b, t, ...) a recording has t rows, the first being recording * t. Of a packed one (n, ...) it has
// those from offsets[recording] to offsets[recording + 1], at most t. Either way only those within its length are read.
// Of a packed batch only these are written, too: results hold zeros before. No row is out of range, whatever offsets
// and lengths hold.
struct Rows {
  const int64_t* offsets = nullptr;  // (b + 1); null: padded
  int64_t n = 0;                     // rows of a packed batch

  D2NET_HD int64_t first(int64_t recording, int64_t t) const {
    return offsets == nullptr ? recording * t : math::clamped_length(offsets, recording, n);
  }
  D2NET_HD int64_t room(int64_t recording, int64_t t) const {
    if (offsets == nullptr) return t;
    const int64_t room = first(recording + 1, t) - first(recording, t);
    return room < 0 ? 0 : room < t ? room : t;
  }
  D2NET_HD int64_t length(const int64_t* lengths, int64_t recording, int64_t t) const {
    return math::clamped_length(lengths, recording, room(recording, t));
  }
  // How many rows of a recording are written.
  D2NET_HD int64_t written(const int64_t* lengths, int64_t recording, int64_t t) const {
    return offsets == nullptr ? t : length(lengths, recording, t);
  }
  // Of the whole batch.
  D2NET_HD int64_t count(int64_t b, int64_t t) const { return offsets == nullptr ? b * t : n; }
};

}  // namespace d2net
