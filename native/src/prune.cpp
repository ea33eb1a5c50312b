// prune.cpp: see prune.h and qap_prune() in qap.h. From the rows of one piece of a picture and what is known of them to
// the rows that are kept. Every way to prune ends here; each rule stands once.
#include "prune.h"

#include "gate/gate.h"
#include "ggml.h"
#include "qap-error.h"

#include <algorithm>
#include <iterator>
#include <string>

static const double SMALL = 64 << 20; // bytes that are not worth a look at the memory

// --- which signal ---

// What `auto` takes, the first that is there.
static const int32_t AUTO_ORDER[] = {
    QAP_SEMANTIC_CLIP_TEXT,
    QAP_SEMANTIC_CLS,
    QAP_SEMANTIC_TEXT,
    QAP_SEMANTIC_ATTENTION,
};

const int32_t * qap_signal_order(int32_t * count) {
    *count = (int32_t) std::size(AUTO_ORDER);
    return AUTO_ORDER;
}

int32_t qap_signal(const struct qap_params * params, uint32_t available) {
    int32_t signal = params->semantic;
    if (signal == QAP_SEMANTIC_AUTO) {
        const auto is_there = [&](int32_t id) { return (available & qap_signal_bit(id)) != 0; };
        const auto found    = std::find_if(std::begin(AUTO_ORDER), std::end(AUTO_ORDER), is_there);
        signal              = found != std::end(AUTO_ORDER) ? *found : (int32_t) QAP_SEMANTIC_NONE;
    } else if (signal != QAP_SEMANTIC_NONE && (available & qap_signal_bit(signal)) == 0) {
        std::string listed;
        for (const int32_t id : AUTO_ORDER) {
            listed += (available & qap_signal_bit(id)) != 0 ? std::string(qap_name_from_id("semantic", id)) + ", " : "";
        }
        return qap_fail(
            "semantic: this model and prompt cannot give %s; use one of %snone", qap_name_from_id("semantic", signal),
            listed.c_str());
    }
    const bool ranks = qap_selector_needs_scores(params->select);
    if (signal == QAP_SEMANTIC_NONE && !params->alpha_dynamic && params->alpha == 1.0f && ranks) {
        return qap_fail("alpha: 1 leaves nothing to rank by without a semantic signal; use alpha < 1");
    }
    qap_clear_error();
    return signal;
}

// --- choice ---

bool qap_needs_cosines(const qap_params & params, int32_t n_real, int32_t n_keep) {
    const bool chooses = n_keep > 0 && n_keep < n_real;
    return chooses && (qap_selector_needs_cosines(params.select) || params.merge != QAP_MERGE_NONE);
}

int qap_choose(
    const qap_params & params, const float * total, const float * cosines, int32_t n_real, int32_t n_keep,
    const qap_dropped & dropped, std::vector<int32_t> & chosen) {
    if (n_keep < 0 || n_keep > n_real) {
        return qap_fail("n_keep: expected a number in 0..%d, got %d", (int) n_real, (int) n_keep);
    }
    chosen.resize((size_t) n_keep);
    if (n_keep == n_real) {
        std::iota(chosen.begin(), chosen.end(), 0);
        return 0;
    }
    const qap_select_input in = { total, cosines, n_real, n_keep, params.seed, dropped };
    return n_keep == 0 ? 0 : qap_select_from(in, params.select, chosen.data());
}

int qap_check_weights(const qap_plan & plan, int32_t n_embd) {
    const size_t n = plan.channel_weights ? plan.channel_weights->size() : 0;
    if (plan.params.error != QAP_ERROR_MODEL || n == (size_t) n_embd) {
        return 0;
    }
    return qap_fail(
        "channel_weights: expected one for each of the %d channels of a token, got %zu in the mmproj file; write them "
        "with qap-gguf convert --annotate and an imatrix of this model, or choose another error",
        (int) n_embd, n);
}

// --- rows ---

int qap_copy_kept(
    const qap_params & params, const float * all, int32_t width, const std::vector<int32_t> & token_rows,
    const float * cosines, const std::vector<int32_t> & chosen, const std::vector<int32_t> & kept, float * out) {
    const auto         n_real = (int32_t) token_rows.size(), n_keep = (int32_t) chosen.size();
    std::vector<float> merged; // [n_keep, width]
    if (params.merge != QAP_MERGE_NONE && n_keep > 0 && n_keep < n_real) {
        std::vector<float> tokens;
        tokens.reserve((size_t) n_real * width);
        for (const int32_t row : token_rows) {
            tokens.insert(tokens.end(), all + (size_t) row * width, all + ((size_t) row + 1) * width);
        }
        merged.resize((size_t) n_keep * width);
        if (qap_merge_average(tokens.data(), cosines, n_real, width, chosen.data(), n_keep, merged.data()) != 0) {
            return -1;
        }
    }
    size_t next = 0; // of the kept tokens, ascending as the rows are
    for (const int32_t row : kept) {
        const bool    is_token = next < chosen.size() && token_rows[(size_t) chosen[next]] == row;
        const float * from     = is_token && !merged.empty() ? &merged[next * width] : all + (size_t) row * width;
        out                    = std::copy_n(from, width, out);
        next += is_token ? 1 : 0;
    }
    return 0;
}

// Ascending numbers in 0..end - 1?
static bool is_ascending(const int32_t * numbers, int32_t count, int32_t end) {
    for (int32_t i = 0; i < count; i++) {
        if (numbers[i] <= (i > 0 ? numbers[i - 1] : -1) || numbers[i] >= end) {
            return false;
        }
    }
    return count >= 0;
}

// The piece's rows as a plan has them; false with an error where they contradict each other.
static bool read_piece(const qap_piece & piece, qap_plan & plan) {
    const bool counts = piece.rows != nullptr && piece.n_rows >= 1 && piece.n_width >= 1 && piece.n_planes >= 1 &&
                        piece.n_width % piece.n_planes == 0;
    if (!counts) {
        qap_fail(
            "rows: expected (n_rows, n_width) with a whole number of planes, got (%d, %d) and %d planes",
            (int) piece.n_rows, (int) piece.n_width, (int) piece.n_planes);
        return false;
    }
    if (!is_ascending(piece.special, piece.n_special, piece.n_rows) || piece.n_special == piece.n_rows) {
        qap_fail("special: expected ascending numbers of some of the %d rows", (int) piece.n_rows);
        return false;
    }
    plan.n_total = piece.n_rows - piece.n_special;
    if (!is_ascending(piece.padding, piece.n_padding, plan.n_total)) {
        qap_fail("padding: expected ascending numbers of some of the %d tokens", (int) plan.n_total);
        return false;
    }
    const qap_dropped & dropped = piece.dropped;
    if (dropped.count < 0 || dropped.count > piece.n_padding ||
        (dropped.count > 0 && (dropped.total == nullptr || dropped.near == nullptr))) {
        qap_fail(
            "dropped: expected at most the %d tokens that cannot be kept, with scores and cosines, got %d",
            (int) piece.n_padding, (int) dropped.count);
        return false;
    }
    const bool of_prompt =
        piece.prompt_semantic == QAP_SEMANTIC_TEXT || piece.prompt_semantic == QAP_SEMANTIC_CLIP_TEXT;
    if (piece.prompt != nullptr && !of_prompt) {
        qap_fail("prompt_semantic: expected text or clip_text, got id %d", (int) piece.prompt_semantic);
        return false;
    }
    plan.special.assign(piece.special, piece.special + piece.n_special);
    plan.padding.assign(piece.padding, piece.padding + piece.n_padding);
    return true;
}

// --- all of it ---

namespace {

// What goes into the scores: the tokens that are no padding, their main planes.
struct tokens_in {
    std::vector<int32_t> numbers; // of the tokens
    std::vector<int32_t> rows;    // theirs among all rows
    std::vector<float>   copy;    // empty where the rows are used as they are
    const float *        x = nullptr;
    std::vector<float>   relevance;

    tokens_in(const qap_piece & piece, const qap_plan & plan)
        : numbers(plan.real_tokens()), rows(qap_token_rows(plan.n_total, plan.special, numbers)), x(piece.rows) {
        if (piece.n_planes == 1 && (int32_t) rows.size() == piece.n_rows) {
            return;
        }
        const int32_t n_embd = piece.n_width / piece.n_planes;
        copy.reserve(rows.size() * (size_t) n_embd);
        for (const int32_t row : rows) {
            const float * from = piece.rows + (size_t) row * piece.n_width;
            copy.insert(copy.end(), from, from + n_embd);
        }
        x = copy.data();
    }
};

} // namespace

static uint32_t available_signals(const qap_piece & piece) {
    const uint32_t attention = piece.attention != nullptr ? qap_signal_bit(QAP_SEMANTIC_CLS) : 0;
    const uint32_t received  = piece.received != nullptr ? qap_signal_bit(QAP_SEMANTIC_ATTENTION) : 0;
    const uint32_t prompt    = piece.prompt != nullptr ? qap_signal_bit(piece.prompt_semantic) : 0;
    return attention | received | prompt;
}

static int score_tokens(
    const qap_piece & piece, const qap_plan & plan, tokens_in & in, const char * device, int32_t n_threads,
    qap_scores & out, std::vector<float> & total) {
    const float * signal = plan.semantic_id == QAP_SEMANTIC_CLS         ? piece.attention
                           : plan.semantic_id == QAP_SEMANTIC_ATTENTION ? piece.received
                           : plan.semantic_id == QAP_SEMANTIC_NONE      ? nullptr
                                                                        : piece.prompt;
    for (size_t i = 0; signal != nullptr && i < in.numbers.size(); i++) {
        in.relevance.push_back(signal[in.numbers[i]]);
    }
    const size_t       n = in.numbers.size();
    std::vector<float> error(n), outlier(n), sensitivity(n), semantic(n);
    total.resize(n);
    qap_scores found = { error.data(), outlier.data(), sensitivity.data(), semantic.data(), total.data(), 0.0f };
    if (qap_score(
            in.x, (int32_t) n, piece.n_width / piece.n_planes, signal != nullptr ? in.relevance.data() : nullptr,
            piece.channel_weights, &plan.params, device, n_threads, &found) != 0) {
        return -1;
    }
    out.alpha             = found.alpha;
    const float * from[5] = { found.error, found.outlier, found.sensitivity, found.semantic, found.total };
    float *       to[5]   = { out.error, out.outlier, out.sensitivity, out.semantic, out.total };
    for (int score = 0; score < 5; score++) {
        if (to[score] != nullptr) {
            plan.spread(in.numbers, from[score], to[score]);
        }
    }
    return 0;
}

// The scores of a piece of which no token can be kept: a flat tile, or one of padding alone.
static void score_nothing(const qap_plan & plan, qap_scores & out) {
    for (float * scores : { out.error, out.outlier, out.sensitivity, out.semantic, out.total }) {
        if (scores != nullptr) {
            std::fill_n(scores, (size_t) plan.n_total, 0.0f);
        }
    }
    out.alpha = plan.params.alpha;
}

// Merging needs all cosines, and another device than the CPU multiplies in an order of its own.
static bool chooses_by_rows(const qap_params & params, int32_t n_real, int32_t n_keep, const char * device) {
    return device == nullptr && params.merge == QAP_MERGE_NONE && n_keep > 0 && n_keep < n_real &&
           qap_selects_by_rows(params.select, n_real);
}

// Does what is allocated for the choice fit, so that the system does not end the process? Small amounts are not asked for.
static int check_room(const qap_params & params, int32_t n_real, int32_t n_embd, int32_t n_keep) {
    const double needed =
        qap_needs_cosines(params, n_real, n_keep) ? qap_choice_bytes(&params, n_real, n_embd, n_keep) : 0.0;
    if (needed < SMALL) {
        return 0;
    }
    const double free = qap_free_memory();
    return needed <= free
               ? 0
               : qap_fail(
                     "select: expected to fit %.1f GB of free memory, needs %.1f GB to compare %d tokens; allow fewer "
                     "tokens of a picture, select by topk without merging, or set QAP_MEMORY_CHECK=0",
                     free / 1e9, needed / 1e9, (int) n_real);
}

int qap_prune(
    const struct qap_piece * piece, const struct qap_params * params, int32_t n_keep, const char * device,
    int32_t n_threads, struct qap_pruned * out) {
    qap_plan plan;
    if (qap_params_check(params) != 0 || !read_piece(*piece, plan)) {
        return -1;
    }
    plan.params      = *params;
    plan.semantic_id = qap_signal(params, available_signals(*piece));
    if (plan.semantic_id < 0) {
        return -1;
    }
    tokens_in     in(*piece, plan);
    const int32_t n_real = (int32_t) in.numbers.size();
    if (n_keep < 0 || n_keep > n_real) {
        return qap_fail("n_keep: expected a number in 0..%d, got %d", (int) n_real, (int) n_keep);
    }
    out->semantic = plan.semantic_id;
    out->score_us = out->select_us = 0;
    const int64_t      started     = ggml_time_us();
    std::vector<float> total, cosines;
    if (n_real == 0) {
        score_nothing(plan, out->scores);
    } else if (score_tokens(*piece, plan, in, device, n_threads, out->scores, total) != 0) {
        return -1;
    }
    const int64_t        scored = ggml_time_us();
    const int32_t        n_embd = piece->n_width / piece->n_planes;
    std::vector<int32_t> chosen;
    if (check_room(*params, n_real, n_embd, n_keep) != 0) {
        return -1;
    }
    if (chooses_by_rows(*params, n_real, n_keep, device)) {
        chosen.resize((size_t) n_keep);
        if (qap_select_by_rows(in.x, total.data(), n_real, n_embd, n_keep, n_threads, chosen.data()) != 0) {
            return -1;
        }
    } else {
        if (qap_needs_cosines(*params, n_real, n_keep)) {
            cosines.resize((size_t) n_real * n_real);
            if (qap_cosines(in.x, n_real, n_embd, device, n_threads, cosines.data()) != 0) {
                return -1;
            }
        }
        if (qap_choose(*params, total.data(), cosines.data(), n_real, n_keep, piece->dropped, chosen) != 0) {
            return -1;
        }
    }
    plan.keep_left(in.numbers, chosen);
    if (out->indices != nullptr) {
        std::copy(plan.indices.begin(), plan.indices.end(), out->indices);
    }
    if (out->kept != nullptr) {
        std::copy(plan.rows.begin(), plan.rows.end(), out->kept);
    }
    if (out->rows != nullptr &&
        qap_copy_kept(*params, piece->rows, piece->n_width, in.rows, cosines.data(), chosen, plan.rows, out->rows) !=
            0) {
        return -1;
    }
    out->score_us  = scored - started;
    out->select_us = ggml_time_us() - scored;
    qap_clear_error();
    return 0;
}

int qap_prune_plan(
    qap_plan & plan, const float * all, int32_t width, int32_t n_planes, int32_t n_threads, std::vector<float> & out) {
    const auto data = [](const std::vector<float> & values) { return values.empty() ? nullptr : values.data(); };
    const std::vector<int32_t> left_out = plan.left_out();
    qap_piece                  piece    = {};
    piece.rows                          = all;
    piece.n_rows                        = plan.n_rows();
    piece.n_width                       = width;
    piece.n_planes                      = n_planes;
    piece.special                       = plan.special.data();
    piece.n_special                     = (int32_t) plan.special.size();
    piece.padding                       = left_out.data();
    piece.n_padding                     = (int32_t) left_out.size();
    piece.attention                     = data(plan.attention);
    piece.received                      = data(plan.received);
    if (qap_check_weights(plan, width / n_planes) != 0) {
        return -1;
    }
    piece.channel_weights       = plan.channel_weights ? plan.channel_weights->data() : nullptr;
    const size_t         n_kept = (size_t) plan.n_keep + plan.special.size();
    std::vector<int32_t> indices((size_t) plan.n_keep);
    for (std::vector<float> * scores : { &plan.error, &plan.outlier, &plan.sensitivity, &plan.semantic, &plan.total }) {
        scores->assign((size_t) plan.n_total, 0.0f);
    }
    out.resize(n_kept * (size_t) width);
    qap_pruned pruned = {};
    pruned.indices    = indices.data();
    pruned.rows       = out.data();
    pruned.scores     = { plan.error.data(),    plan.outlier.data(), plan.sensitivity.data(),
                          plan.semantic.data(), plan.total.data(),   0.0f };
    if (qap_prune(&piece, &plan.params, plan.n_keep, nullptr, n_threads, &pruned) != 0) {
        return -1;
    }
    plan.alpha       = pruned.scores.alpha;
    plan.semantic_id = pruned.semantic;
    plan.keep(std::move(indices));
    return 0;
}

int qap_kept_rows(
    int32_t n_tokens, const int32_t * special, int32_t n_special, const int32_t * indices, int32_t n_keep,
    int32_t * kept) {
    if (n_tokens < 0 || n_special < 0 || !is_ascending(special, n_special, n_tokens + n_special)) {
        return qap_fail("special: expected ascending numbers of rows");
    }
    if (!is_ascending(indices, n_keep, n_tokens)) {
        return qap_fail("indices: expected ascending numbers in 0..%d", (int) n_tokens - 1);
    }
    qap_plan plan;
    plan.n_total = n_tokens;
    plan.special.assign(special, special + n_special);
    plan.keep(std::vector<int32_t>(indices, indices + n_keep));
    std::copy(plan.rows.begin(), plan.rows.end(), kept);
    qap_clear_error();
    return 0;
}
