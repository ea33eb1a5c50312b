// checks.h: the parts of gpu-check. Each compares a device with the CPU or times it, and adds to the result; a
// difference above its limit is a line in `failures`, and the run goes on.
#pragma once

#include "ggml-backend.h"
#include "model-on-device.h"

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

using nlohmann::ordered_json;

struct check_state {
    ggml_backend_dev_t       device    = nullptr;
    ggml_backend_dev_t       cpu       = nullptr;
    int                      n_threads = 4;
    int                      rounds    = 5;
    int                      n_text    = 40;
    std::vector<std::string> failures;

    // Note a value that is to stay within a limit; NaN does not.
    void expect_at_most(const std::string & what, double value, double limit);
    void expect(const std::string & what, bool holds);
};

void progress(const std::string & text); // to stderr

// Every error and outlier, and the cosines, over random features of this size.
ordered_json check_scorers(check_state & state, int n_tokens, int n_embd);

// Encoder, scores, selections, bytes and logits of one pair of files.
struct model_case {
    std::string name;
    model_files files;
    uint32_t    side;          // of the picture, in pixels
    bool        flash_attn;    // in the encoder
    double      encoder_limit; // NMSE of features and scores
    double      logits_limit;  // NMSE
};

ordered_json check_model(check_state & state, const model_case & model);

// Greedy answers of the packaged model about its sample, dense and pruned: the same words on both devices.
ordered_json check_answers(
    check_state & state, const model_files & files, const std::string & sample,
    const std::vector<std::string> & questions);

// Encoders whose program names no device, beside a language model on the CPU: qap_device_set() decides. Only Mirror0 tells
// where an encoder ran.
ordered_json check_choice(check_state & state, const model_files & files);

// Milliseconds of score and selection over features that lie on the device.
ordered_json time_scores(check_state & state, int n_tokens, int n_embd, int n_keep);

// Milliseconds of encode and prefill, dense and pruned, in turns.
ordered_json time_model(check_state & state, const model_case & model);
