// fuzz-image.cpp: the layout of a picture (rows, planes, special rows, padding, tiles), to the pruner. A layout that
// contradicts itself is refused; else exactly K tokens are kept, none of them padding, and all special rows.
#include "fuzz-input.h"
#include "qap.h"

#include <set>
#include <vector>

// Mostly ascending numbers, so that many layouts are right.
static std::vector<int32_t> numbers(fuzz_input & in, int32_t most) {
    std::vector<int32_t> found;
    for (int32_t count = in.between(0, most), at = -1; count > 0; count--) {
        at += in.take<int8_t>() % 4 + 1;
        found.push_back(at);
    }
    return found;
}

static void check_share(fuzz_input & in) {
    std::vector<int32_t> sizes, share;
    int64_t              total = 0;
    for (int32_t count = in.between(0, 8); count > 0; count--) {
        sizes.push_back(in.take<int16_t>());
        total += sizes.back();
    }
    share.resize(sizes.size());
    const int32_t n_keep = in.take<int16_t>();
    if (qap_share(sizes.data(), (int32_t) sizes.size(), n_keep, share.data()) != 0) {
        return;
    }
    int64_t kept = 0;
    for (size_t i = 0; i < sizes.size(); i++) {
        MUST(share[i] >= 0 && share[i] <= sizes[i]);
        kept += share[i];
    }
    MUST(kept == std::min<int64_t>(n_keep, total));
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz_input in = { data, size };
    check_share(in);
    qap_params params                  = qap_params_default();
    params.select                      = in.between(0, 7);
    params.merge                       = in.between(0, 2);
    params.semantic                    = in.between(-1, 6);
    params.group_size                  = in.between(0, 9);
    params.error                       = in.between(1, 9);
    const std::vector<int32_t> special = numbers(in, 6), padding = numbers(in, 6);
    qap_piece                  piece = {};
    piece.n_rows                     = in.between(-1, 24);
    piece.n_width                    = in.between(-1, 12);
    piece.n_planes                   = in.between(-1, 3);
    const size_t       n             = (size_t) (std::max(piece.n_rows, 1) * std::max(piece.n_width, 1));
    std::vector<float> rows(n), signal((size_t) std::max(piece.n_rows, 1)), attention(signal.size());
    std::vector<float> weights((size_t) std::max(piece.n_width, 1));
    piece.dropped.count = in.between(-1, 8);
    std::vector<float> dropped((size_t) std::max(piece.dropped.count, 0));
    std::vector<float> near(dropped.size() * (size_t) std::max(piece.n_rows, 0));
    for (std::vector<float> * values : { &rows, &signal, &attention, &weights, &dropped, &near }) {
        for (float & value : *values) {
            value = in.take<uint8_t>() == 255 ? in.take<float>() : (float) in.take<int8_t>(); // any bits, now and then
        }
    }
    piece.rows            = rows.data();
    piece.special         = special.data();
    piece.n_special       = (int32_t) special.size();
    piece.padding         = padding.data();
    piece.n_padding       = (int32_t) padding.size();
    piece.attention       = in.take<uint8_t>() % 2 != 0 ? attention.data() : nullptr;
    piece.prompt          = in.take<uint8_t>() % 2 != 0 ? signal.data() : nullptr;
    piece.prompt_semantic = in.between(0, 5);
    piece.channel_weights = in.take<uint8_t>() % 4 != 0 ? weights.data() : nullptr;
    piece.dropped.total   = in.take<uint8_t>() % 8 != 0 ? dropped.data() : nullptr;
    piece.dropped.near    = near.data();
    const int32_t n_keep  = in.between(-1, 26);

    const size_t         room = (size_t) std::max(n_keep, 0);
    std::vector<int32_t> indices(room), kept(room + special.size());
    std::vector<float>   out(kept.size() * (size_t) std::max(piece.n_width, 1));
    qap_pruned           pruned = {};
    pruned.indices              = indices.data();
    pruned.kept                 = kept.data();
    pruned.rows                 = out.data();
    if (qap_prune(&piece, &params, n_keep, "cpu", 1, &pruned) != 0) {
        MUST(qap_last_error()[0] != '\0');
        return 0;
    }
    const std::set<int32_t> no_tokens(padding.begin(), padding.end()), chosen(indices.begin(), indices.end());
    MUST(chosen.size() == room && std::is_sorted(indices.begin(), indices.end()));
    for (const int32_t index : indices) {
        MUST(index >= 0 && index < piece.n_rows - piece.n_special && no_tokens.count(index) == 0);
    }
    for (const int32_t row : special) {
        MUST(std::find(kept.begin(), kept.end(), row) != kept.end());
    }
    return 0;
}
