// model-on-device.h: an mmproj and a language model on one ggml device, through the public headers of libmtmd, libllama
// and qap.h alone. Errors are std::runtime_error with one line.
#pragma once

#include "ggml-backend.h"
#include "llama-cpp.h"
#include "mtmd.h"
#include "qap.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

struct model_files {
    std::string mmproj;
    std::string model;
};

struct picture {
    uint32_t             width  = 0;
    uint32_t             height = 0;
    std::vector<uint8_t> rgb;
};

picture noise_picture(uint32_t side);

// What one encode gave. `arrays` are the scores by name, of a dense encode the attention only.
struct encoded {
    std::shared_ptr<mtmd_input_chunks>        list; // owns the chunk
    const mtmd_input_chunk *                  chunk      = nullptr;
    int32_t                                   n_total    = 0;
    int64_t                                   bytes_read = 0;
    double                                    seconds    = 0.0;
    std::vector<float>                        rows; // [n_keep, n_embd]
    std::vector<int32_t>                      indices;
    std::map<std::string, std::vector<float>> arrays;
};

enum class how { plain, capture, prune }; // as without us; all tokens with their attention; K tokens

class device_model {
public:
    struct options {
        bool flash_attn  = true; // of the encoder
        int  n_threads   = 4;
        int  n_ctx       = 1024;
        bool watch_nodes = false; // count the encoder's nodes that the device cannot run
        bool by_default  = false; // name no device for the encoder: qap_device_set() decides
    };

    device_model(const model_files & files, ggml_backend_dev_t device, const options & opt);

    encoded encode(const picture & image, how mode, const qap_params & params = qap_params_default());

    // A prompt of n_text text tokens around the rows (all tokens, or those of `indices`) into an empty cache; seconds.
    // Logits of the last token lie in `logits` then.
    double prefill(
        const encoded & image, const std::vector<float> & rows, const std::vector<int32_t> & indices, int n_text);

    // Greedy answer to one question about a picture file; null params keep all tokens.
    std::string answer(const std::string & file, const std::string & question, const qap_params * params);

    std::vector<float> logits;
    int                n_embd      = 0;
    int                unsupported = 0; // nodes of the encoder that its device cannot run, with watch_nodes

private:
    std::shared_ptr<mtmd_input_chunks> tokenize(const std::string & text, const mtmd_bitmap * bitmap, bool special);
    void                               decode(const std::vector<llama_token> & tokens, int n_past);

    ggml_backend_dev_t device;
    llama_model_ptr    lm;
    llama_context_ptr  lctx;
    mtmd::context_ptr  ctx;
};
