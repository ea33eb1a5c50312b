// fuzz-words.cpp: names and values of a request's or the environment's settings. What is taken is in range; what is
// refused changes nothing.
#include "fuzz-input.h"
#include "qap.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input in     = { data, size };
    qap_params params = qap_params_default();
    while (in.size > 0) {
        const std::string name = in.word(), value = in.word();
        const qap_params  before = params;
        if (qap_params_set(&params, name.c_str(), value.c_str()) != 0) {
            MUST(qap_last_error()[0] != '\0' && std::memcmp(&before, &params, sizeof(params)) == 0);
            continue;
        }
        MUST(qap_params_check(&params) == 0);
        MUST(qap_params_count(&params, 1) == 1 && qap_params_count(&params, 1000) <= 1000);
    }
    return 0;
}
