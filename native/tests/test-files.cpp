// test-files.cpp: the gate and the loader of CLIP's text tower over every file of a folder, each as each kind. What they
// say of it matters little (tests/robust compares that); that they read no byte too many does.
#include "check.h"
#include "qap-clip-text.h"
#include "qap.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <string>

int main(int argc, char ** argv) {
    CHECK(argc == 2);
    std::vector<std::string> paths;
    for (const auto & entry : std::filesystem::directory_iterator(argv[1])) {
        paths.push_back(entry.path().string());
    }
    std::sort(paths.begin(), paths.end());
    int passed = 0, refused = 0, towers = 0;
    for (const std::string & path : paths) {
        int64_t n_embd = 0;
        for (const int status :
             { qap_check_mmproj(path.c_str(), true, &n_embd), qap_check_language(path.c_str(), true, 64, nullptr) }) {
            (status == 0 ? passed : refused)++;
        }
        qap_clip_text * tower = qap_clip_text_open(path.c_str(), nullptr, 1);
        if (tower == nullptr) {
            CHECK(std::strlen(qap_last_error()) > 0);
            continue;
        }
        const qap_clip_text_shape shape = qap_clip_text_get_shape(tower);
        std::vector<int32_t>      ids((size_t) shape.n_ctx + 1);
        std::vector<float>        embedding((size_t) shape.n_proj);
        for (size_t i = 0; i < ids.size(); i++) {
            ids[i] = (int32_t) i % shape.n_vocab;
        }
        if (qap_clip_text_embed(tower, ids.data(), shape.n_ctx, embedding.data()) == 0) { // damaged weights: NaN
            towers++;
        }
        for (const int32_t count : { 0, -1, shape.n_ctx + 1 }) {
            CHECK(qap_clip_text_embed(tower, ids.data(), count, embedding.data()) == -1);
        }
        for (const int32_t id : { -1, shape.n_vocab, INT32_MIN, INT32_MAX }) {
            CHECK(qap_clip_text_embed(tower, &id, 1, embedding.data()) == -1);
        }
        qap_clip_text_free(tower);
    }
    CHECK(!paths.empty() && passed > 0 && refused > 0 && towers > 0);
    std::printf(
        "%zu files: the gate let %d pass and refused %d, %d text towers ran\n", paths.size(), passed, refused, towers);
    return 0;
}
