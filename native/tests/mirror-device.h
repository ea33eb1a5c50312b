// mirror-device.h: a device for machines without a GPU: "Mirror0" computes on the CPU, but its memory is its own, as a
// GPU's is: nothing reaches it, and nothing leaves it, but by copies, and these are counted.
#pragma once

#include <cstdint>

// Adds the device to ggml's list; once.
void mirror_register();

// Bytes since the last reset: out of the device, the largest single copy out of it, and into it.
struct mirror_traffic {
    int64_t to_host   = 0;
    int64_t largest   = 0;
    int64_t to_device = 0;
};

mirror_traffic mirror_count();
void           mirror_reset();

// From now on every third number that leaves the device is too large by this factor less one: for a check of the checks.
void mirror_distort(float by);
