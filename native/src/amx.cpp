// amx.cpp: keep ggml's CPU backend away from AMX where the compiler broke it.
//
// GCC before 14 may drop the stores to the tile configuration in front of ldtilecfg (its _tile_loadconfig tells the
// compiler about 8 of the 64 bytes only), and the first product with a quantized matrix ends the process by a signal:
// llama.cpp issue #20824 and pull request #26954. ggml decides once, in ggml_backend_cpu_get_extra_buffer_types(),
// whether to offer AMX: it asks the kernel for the tile state and goes without where that is refused. The kernel
// refuses while a thread's alternate signal stack is too small for the larger state (arch/x86/kernel/signal.c,
// validate_sigaltstack), so with such a stack in place ggml decides for its other kernels, for good.
#include "device.h"
#include "ggml-backend.h"
#include "qap.h"

#include <atomic>
#include <cstring>

static std::atomic<bool> came_too_late{ false };

bool qap_amx_is_broken() {
    return came_too_late;
}

// Whether the CPU backend offers AMX buffers; makes the backend decide.
static bool offers_amx() {
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (dev == nullptr) {
        return false;
    }
    auto get_types = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts");
    if (get_types == nullptr) {
        return false;
    }
    for (ggml_backend_buffer_type_t * type = get_types(dev); type != nullptr && *type != nullptr; type++) {
        if (std::strcmp(ggml_backend_buft_name(*type), "AMX") == 0) {
            return true;
        }
    }
    return false;
}

#if defined(__linux__) && defined(__x86_64__)

#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

// Silences stderr for one block: ggml prints a line where the kernel refuses, which here is no news.
class silent_stderr {
public:
    silent_stderr() {
        std::fflush(stderr);
        const int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
        saved          = null >= 0 ? fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3) : -1;
        if (saved >= 0) {
            dup2(null, STDERR_FILENO);
        }
        if (null >= 0) {
            close(null);
        }
    }
    ~silent_stderr() {
        if (saved >= 0) {
            std::fflush(stderr);
            dup2(saved, STDERR_FILENO);
            close(saved);
        }
    }
    silent_stderr(const silent_stderr &)             = delete;
    silent_stderr & operator=(const silent_stderr &) = delete;

private:
    int saved = -1;
};

bool qap_avoid_amx(void) {
    // enough for the state of AVX-512 (about 3.5 KB), which the call below is measured against, not for AMX's 11 KB
    static char small_stack[6144];
    stack_t     small = {};
    stack_t     old   = {};
    small.ss_sp       = small_stack;
    small.ss_size     = sizeof(small_stack);
    if (sigaltstack(&small, &old) != 0) {
        came_too_late = offers_amx();
        return !came_too_late;
    }
    const bool offered = [] {
        const silent_stderr silent;
        return offers_amx();
    }();
    if ((old.ss_flags & SS_DISABLE) != 0) {
        old.ss_flags = SS_DISABLE;
    }
    sigaltstack(&old, nullptr);
    came_too_late = offered;
    return !offered;
}

// CMakeLists.txt asks ggml's library for its compiler; where nobody did, nothing is known of it.
#ifndef QAP_AMX_BROKEN
#define QAP_AMX_BROKEN 1
#endif

#if QAP_AMX_BROKEN
// Python calls qap_avoid_amx() where it found that ggml is the work of such a compiler. In other programs, such as
// llama-server, nobody calls it, and a language model is loaded before libmtmd is asked for anything.
__attribute__((constructor)) static void guard_programs() {
    const char * asked = std::getenv("QAP_AMX");
    const bool   on    = asked != nullptr && std::strcmp(asked, "1") == 0;
    if (!on && dlsym(RTLD_DEFAULT, "Py_IsInitialized") == nullptr) {
        qap_avoid_amx();
    }
}
#endif

#else

bool qap_avoid_amx(void) {
    return !offers_amx();
}

#endif
