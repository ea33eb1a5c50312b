// repack.h: an encoder's matrices in the buffer types of ggml's faster kernels ("extra" ones: repacked, AMX, ...), where
// the language model's are too. Upstream puts every weight of an encoder into the default buffer type. 013-repack.patch
// calls what stands here while clip.cpp loads a file.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct clip_ctx;
struct clip_model;

// What became of the weights of one encoder. The buffers must live as long as the weights.
struct qap_repacked {
    std::vector<std::string>             products; // weights that graphs use for nothing but products with activations
    std::vector<ggml_backend_buffer_ptr> buffers;
    size_t                               bytes = 0; // of the weights in them
};

// Of an encoder that is loaded. clip.cpp, in the patch
const qap_repacked & qap_repacked_of(const clip_ctx * ctx);

// clip.cpp, clip_model_loader::load_tensors(), before weights are allocated: are their uses to be looked at? That takes the
// encoder's graphs, which a file that nobody has checked could make fail, so it is done only where the answer is needed.
bool qap_hook_repacks(const clip_model & model, ggml_backend_t backend, bool no_alloc);

// While one lives, encoders that this thread loads have their `products` noted, even if no weight is read.
struct qap_products_wanted {
    qap_products_wanted();
    ~qap_products_wanted();
    qap_products_wanted(const qap_products_wanted &)             = delete;
    qap_products_wanted & operator=(const qap_products_wanted &) = delete;
};

// Finds the weights that graphs use for nothing but products, and those of them that may lie in an extra buffer type: all
// their products are such that the kernels of that type can do them. Anything else that reads a weight (a view, a sum, a
// lookup of rows) would find the values in another order.
class qap_repacking {
public:
    // weights: the context of the encoder's weights, none of them allocated. no_alloc: none will be
    qap_repacking(ggml_context * weights, ggml_backend_t backend, bool no_alloc);

    // A graph that the encoder can run. Its weights may be used in no other way by another graph.
    void look(ggml_cgraph * gf);

    // Allocates the weights that were found; the caller allocates the others and fills all of them.
    qap_repacked finish();

private:
    struct extra_type {
        ggml_backend_buffer_type_t type;
        ggml_backend_buffer_ptr    empty; // a buffer of that type, for questions
    };
    struct uses {
        bool     products = true; // nothing else
        uint32_t types    = ~0u;  // bits of `extra` that all uses allow
    };

    uint32_t types_for(const ggml_tensor * product) const;

    ggml_context *                weights;
    ggml_backend_dev_t            device;
    std::vector<extra_type>       extra; // best first, as ggml lists them
    std::map<ggml_tensor *, uses> found;
};
