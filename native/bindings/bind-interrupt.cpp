// bind-interrupt.cpp: Ctrl-C during a long prefill. libllama asks a callback before each node of a CPU graph whether to
// stop (llama_set_abort_callback); ours lets Python handle its signals there, some times a second. Python runs signal
// handlers in its main thread only, so in other threads the callback never stops anything. Meanwhile libllama is quiet: a
// batch that was stopped makes it warn of what it takes out of its cache again.
#include "bindings.h"
#include "llama.h"
#include "quiet.h"

#include <chrono>
#include <optional>

class interrupt {
public:
    interrupt(uintptr_t lctx, bool verbose) : lctx(reinterpret_cast<llama_context *>(lctx)), verbose(verbose) {}

    interrupt(const interrupt &)             = delete;
    interrupt & operator=(const interrupt &) = delete;

    void watch() {
        last = std::chrono::steady_clock::now();
        quiet.emplace(verbose);
        quiet_too.emplace();
        llama_set_abort_callback(lctx, &interrupt::asked, this);
    }

    // In the thread of watch(). is_open: the context is still there.
    void release(bool is_open) {
        if (is_open) {
            llama_set_abort_callback(lctx, nullptr, nullptr);
        }
        quiet_too.reset();
        quiet.reset();
    }

    // The exception that a signal handler raised, or None.
    py::object error() const { return raised ? raised->value() : py::none(); }

private:
    static bool asked(void * self_) {
        auto * const self = static_cast<interrupt *>(self_);
        const auto   now  = std::chrono::steady_clock::now();
        if (self->raised) {
            return true;
        }
        if (now - self->last < std::chrono::milliseconds(50)) {
            return false;
        }
        self->last = now;
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() == 0) {
            return false;
        }
        self->raised = std::make_unique<py::error_already_set>();
        return true;
    }

    llama_context *                        lctx;
    bool                                   verbose;
    std::optional<quiet_scope>             quiet;
    std::optional<quiet_llama>             quiet_too;
    std::chrono::steady_clock::time_point  last;
    std::unique_ptr<py::error_already_set> raised;
};

void register_interrupt(py::module_ & m) {
    py::class_<interrupt>(m, "Interrupt")
        .def(py::init<uintptr_t, bool>(), py::arg("lctx"), py::arg("verbose"))
        .def("watch", &interrupt::watch)
        .def("release", &interrupt::release, py::arg("is_open"))
        .def("error", &interrupt::error);
}
