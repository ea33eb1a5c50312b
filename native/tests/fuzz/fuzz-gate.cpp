// fuzz-gate.cpp: any bytes as a model file, to the gate. The first byte says as which kind. The file lives in memory.
#include "fuzz-input.h"
#include "ggml.h"
#include "qap.h"

#include <sys/mman.h>
#include <unistd.h>

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr); // a line for each bad file is too slow
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input    in        = { data, size };
    const uint8_t kind      = in.take<uint8_t>();
    const int     file      = memfd_create("fuzz", 0);
    const bool    is_mmproj = kind % 2 == 0;
    MUST(file >= 0 && write(file, in.data, in.size) == (ssize_t) in.size);
    const std::string path   = "/proc/self/fd/" + std::to_string(file);
    int64_t           n_embd = 0;
    const int         status = is_mmproj ? qap_check_mmproj(path.c_str(), false, &n_embd)
                                         : qap_check_language(path.c_str(), false, 64, &n_embd);
    close(file);
    const std::string said = qap_last_error();
    MUST(status == 0 ? said.empty() && n_embd >= 0 : !said.empty() && said.find('\n') == std::string::npos);
    return 0;
}
