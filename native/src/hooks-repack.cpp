// hooks-repack.cpp: see repack.h. Upstream facts (llama.cpp 0c1e570): llama-model.cpp asks for the same buffer types in
// make_cpu_buft_list() and, weight by weight, in weight_buft_supported(). The kernels of ggml-cpu/repack.cpp take
// activations of up to three dimensions.
#include "repack.h"

#include "clip-model.h"
#include "device.h"
#include "families/layout.h"
#include "ggml-alloc.h"
#include "qap.h"

#include <cstdlib>
#include <cstring>

// QAP_ENCODER_REPACK=0 leaves the weights as they are in the file.
static bool is_wanted() {
    const char * asked = std::getenv("QAP_ENCODER_REPACK");
    return asked == nullptr || std::strcmp(asked, "0") != 0;
}

static thread_local bool products_wanted = false;

qap_products_wanted::qap_products_wanted() {
    products_wanted = true;
}

qap_products_wanted::~qap_products_wanted() {
    products_wanted = false;
}

// On another device than the CPU weights stay in its own memory.
static bool may_repack(ggml_backend_t backend) {
    const auto type = ggml_backend_dev_type(ggml_backend_get_device(backend));
    return type == GGML_BACKEND_DEVICE_TYPE_CPU && is_wanted() && !qap_disabled() && !qap_stock_encoder();
}

bool qap_hook_repacks(const clip_model & model, ggml_backend_t backend, bool no_alloc) {
    // with a projector that was never compared here, what its graphs do is not known either
    const bool known = model.modality == CLIP_MODALITY_VISION && qap_projector_compared(model.proj_type);
    return known && (products_wanted || (!no_alloc && may_repack(backend)));
}

qap_repacking::qap_repacking(ggml_context * weights, ggml_backend_t backend, bool no_alloc)
    : weights(weights), device(ggml_backend_get_device(backend)) {
    if (no_alloc || !may_repack(backend)) {
        return;
    }
    auto get_types = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts");
    ggml_backend_buffer_type_t * types = get_types != nullptr ? get_types(device) : nullptr;
    for (; types != nullptr && *types != nullptr && extra.size() < 32; types++) {
        const bool is_amx = std::strcmp(ggml_backend_buft_name(*types), "AMX") == 0;
        if (is_amx && qap_amx_is_broken()) {
            continue;
        }
        ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(*types, 0));
        if (empty) {
            extra.push_back({ *types, std::move(empty) });
        }
    }
}

// Is this a product of a matrix with activations, of which there are up to three dimensions?
static bool is_product(const ggml_tensor * node) {
    const ggml_tensor * w = node->src[0];
    const ggml_tensor * x = node->src[1];
    return node->op == GGML_OP_MUL_MAT && w != x && ggml_n_dims(w) == 2 && x->type == GGML_TYPE_F32 && x->ne[3] == 1 &&
           x->nb[0] == sizeof(float);
}

uint32_t qap_repacking::types_for(const ggml_tensor * product) const {
    ggml_tensor asked  = *product;
    ggml_tensor weight = *product->src[0];
    asked.src[0]       = &weight;
    uint32_t types     = 0;
    for (size_t i = 0; i < extra.size(); i++) {
        weight.buffer = extra[i].empty.get();
        types |= ggml_backend_dev_supports_op(device, &asked) ? 1u << i : 0u;
    }
    return types;
}

void qap_repacking::look(ggml_cgraph * gf) {
    std::map<const ggml_tensor *, ggml_tensor *> known;
    for (ggml_tensor * w = ggml_get_first_tensor(weights); w != nullptr; w = ggml_get_next_tensor(weights, w)) {
        known[w] = w;
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        for (int k = 0; k < GGML_MAX_SRC; k++) {
            const auto weight = known.find(node->src[k]);
            if (weight == known.end()) {
                continue;
            }
            uses &     all     = found[weight->second];
            const bool product = k == 0 && is_product(node);
            all.products &= product;
            all.types &= product ? types_for(node) : 0;
        }
    }
}

qap_repacked qap_repacking::finish() {
    qap_repacked out;
    for (const auto & [weight, all] : found) {
        if (all.products) {
            out.products.emplace_back(weight->name);
        }
    }
    for (size_t i = 0; i < extra.size(); i++) {
        ggml_backend_buffer_type_t type      = extra[i].type;
        const size_t               alignment = ggml_backend_buft_get_alignment(type);
        std::vector<ggml_tensor *> chosen;
        size_t                     size = 0;
        for (const auto & [weight, all] : found) {
            if (weight->data == nullptr && (all.types & (1u << i)) != 0) {
                chosen.push_back(weight);
                size += GGML_PAD(ggml_backend_buft_get_alloc_size(type, weight), alignment);
            }
        }
        ggml_backend_buffer_ptr buffer(chosen.empty() ? nullptr : ggml_backend_buft_alloc_buffer(type, size));
        if (!buffer) {
            continue; // none, or no room: another type, or the default one
        }
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_tallocr place = ggml_tallocr_new(buffer.get());
        for (ggml_tensor * weight : chosen) {
            // it fits, for the buffer was made for them
            GGML_ASSERT(ggml_tallocr_alloc(&place, weight) == GGML_STATUS_SUCCESS);
            out.bytes += ggml_nbytes(weight);
        }
        out.buffers.push_back(std::move(buffer));
    }
    return out;
}
