// positions.cpp: where the kept tokens of a picture stand in the language model's sequence.
//
// libllama refuses gaps where a token has one position, and allows them with M-RoPE (llama-batch.cpp, llama.cpp 0c1e570).
// A language model that was relabelled (python/qap_gguf/convert/relabel) is one with one position, in a file that says
// M-RoPE: its pictures count like text, and what is kept of them stays at its own index.
#include "llama.h"
#include "qap-hooks.h"
#include "qap-plan.h"
#include "qap.h"

#include <cstring>
#include <stdexcept>

bool qap_model_relabelled(const llama_model * model) {
    if (model == nullptr) {
        return false;
    }
    const llama_rope_type rope = llama_model_rope_type(model);
    char                  origin[64];
    return (rope == LLAMA_ROPE_TYPE_MROPE || rope == LLAMA_ROPE_TYPE_IMROPE) &&
           llama_model_meta_val_str(model, QAP_KEY_ORIGIN, origin, sizeof(origin)) > 0;
}

bool qap_hook_index(const llama_model * model) {
    return qap_model_relabelled(model); // with QAP_DISABLE=1 too: the file is made for it
}

void qap_hook_hunyuan(bool has_axes) {
    if (!has_axes) {
        throw std::runtime_error(
            "qap: expected a language model with M-RoPE beside the projector hunyuanvl, got one with one position a "
            "token, or a relabelled one; pass the language model that this mmproj was made with");
    }
}

size_t qap_hook_source_index(const qap_plan * plan, bool places, size_t i) {
    const bool own = plan != nullptr && (places || plan->gaps) && i < plan->rows.size();
    return own ? (size_t) plan->rows[i] : i;
}

int32_t qap_hook_n_pos(const qap_plan & plan) {
    return plan.gaps ? plan.n_rows() : plan.n_keep + (int32_t) plan.special.size();
}
