// memory.cpp: does it fit? What the machine has is what ggml's devices report, the memory of a container counted.
// A language model's weights are mapped: they need room somewhere in RAM, swap or a GPU, not free room now. What is
// allocated (the encoder's weights, the KV cache, activations) needs room that is free, or the kernel ends the process.
#include "gate-file.h"
#include "gate.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace qap_gate {

static double number_in(const std::string & path) {
    std::ifstream in(path);
    double        value = -1.0;
    return in >> value ? value : -1.0; // "max" is no number
}

// What counts as used and is given back when it is needed: copies of files.
static double cache_in(const std::string & path) {
    std::ifstream in(path);
    std::string   name;
    double        value = 0.0, sum = 0.0;
    while (in >> name >> value) {
        sum += name == "inactive_file" || name == "active_file" ? value : 0.0;
    }
    return sum;
}

// A group's limit and what is left of it, into the smallest so far.
static void shrink(const std::string & folder, const char * limit_name, const char * used_name, container_room & room) {
    const double limit = number_in(folder + "/" + limit_name), used = number_in(folder + "/" + used_name);
    if (limit < 0.0 || limit > 1e18) { // version 1 has a number near 2^63 for no limit
        return;
    }
    room.total = std::min(room.total, limit);
    if (used >= 0.0) {
        room.free = std::min(room.free, std::max(0.0, limit - used) + cache_in(folder + "/memory.stat"));
    }
}

container_room find_container_room(const std::string & groups, const std::string & mount) {
    container_room room;
    std::ifstream  in(groups);
    std::string    line;
    while (std::getline(in, line)) { // "0::/path" is version 2, "7:memory:/path" version 1
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) {
            continue;
        }
        const std::string kinds = "," + line.substr(first + 1, second - first - 1) + ",";
        const bool        v1 = kinds.find(",memory,") != std::string::npos, v2 = kinds == ",,";
        if (!v1 && !v2) {
            continue;
        }
        const std::string root = mount + (v1 ? "/memory" : "");
        std::string       path = line.substr(second + 1);
        while (true) { // every group around this one limits it too; where the path is the host's, the root is ours
            path.erase(path.find_last_not_of('/') + 1);
            shrink(
                root + path, v1 ? "memory.limit_in_bytes" : "memory.max",
                v1 ? "memory.usage_in_bytes" : "memory.current", room);
            if (path.empty()) {
                break;
            }
            path.erase(path.find_last_of('/') + 1);
        }
    }
    return room;
}

struct room {
    double total = 0.0; // RAM and swap
    double free  = 0.0;
    double gpu   = 0.0; // free on GPUs
};

static room measure() {
    room m;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev   = ggml_backend_dev_get(i);
        size_t             free  = 0;
        size_t             total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU) {
            m.gpu += (double) free;
        } else {
            m.total = std::max(m.total, (double) total);
            m.free  = std::max(m.free, (double) free);
        }
    }
    // Linux says more: what can be reclaimed counts as free, swap counts
    std::ifstream in("/proc/meminfo");
    std::string   line;
    double        ram = 0.0, swap = 0.0, swap_free = 0.0, available = -1.0;
    while (std::getline(in, line)) {
        double kib = 0.0;
        if (std::sscanf(line.c_str(), "MemTotal: %lf", &kib) == 1) {
            ram = kib * 1024.0;
        } else if (std::sscanf(line.c_str(), "SwapTotal: %lf", &kib) == 1) {
            swap = kib * 1024.0;
        } else if (std::sscanf(line.c_str(), "SwapFree: %lf", &kib) == 1) {
            swap_free = kib * 1024.0;
        } else if (std::sscanf(line.c_str(), "MemAvailable: %lf", &kib) == 1) {
            available = kib * 1024.0;
        }
    }
    if (available >= 0.0) {
        m.total = ram + swap;
        m.free  = available + swap_free;
    }
    const container_room container = find_container_room("/proc/self/cgroup", "/sys/fs/cgroup");
    m.total                        = std::min(m.total, container.total);
    m.free                         = std::min(m.free, container.free);
    return m;
}

static bool is_off() {
    const char * value = std::getenv("QAP_MEMORY_CHECK");
    return value != nullptr && std::strcmp(value, "0") == 0;
}

void check_memory(const file & f, double mapped, double allocated) {
    if (is_off()) {
        return;
    }
    const room m = measure();
    if (m.total <= 0.0) {
        return; // a system that does not tell
    }
    const bool too_much_now = allocated > m.free + m.gpu;
    if (mapped + allocated > m.total + m.gpu || too_much_now) {
        char line[200];
        std::snprintf(
            line, sizeof(line), "expected to fit %.1f GB of %s memory, needs %.1f GB",
            (too_much_now ? m.free + m.gpu : m.total + m.gpu) / 1e9, too_much_now ? "free" : "all",
            (too_much_now ? allocated : mapped + allocated) / 1e9);
        f.refuse(line, "free memory, take a smaller context, or set QAP_MEMORY_CHECK=0 to try all the same");
    }
}

} // namespace qap_gate

double qap_free_memory() {
    const qap_gate::room m = qap_gate::is_off() ? qap_gate::room() : qap_gate::measure();
    return m.total > 0.0 ? m.free : std::numeric_limits<double>::infinity();
}
