// test-threads.cpp: what may be called from several threads at once, for ThreadSanitizer: the default, the override
// stacks, errors, scores and selections, and one text tower that all share.
#include "check.h"
#include "qap-clip-text.h"
#include "qap-params.h"
#include "qap.h"

#include <cstring>
#include <string>
#include <thread>

static const int N_THREADS = 4;

template <typename work> static void in_threads(const work & run) {
    std::vector<std::thread> threads;
    for (int t = 0; t < N_THREADS; t++) {
        threads.emplace_back([&run, t] { run(t); });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

// An override is its thread's own, whatever the default is set to meanwhile; an error too.
static void test_state(int rounds) {
    in_threads([&](int t) {
        generator  rng((unsigned) t);
        qap_params params = qap_params_default(), got = {};
        for (int i = 0; i < rounds; i++) {
            params.n_keep = between(rng, 1, 1000);
            CHECK(qap_default_set(i % 5 == 0 ? nullptr : &params) == 0);
            qap_default_get(&got);
            params.n_keep = 2000 + t;
            CHECK(qap_override_push(&params) == 0);
            CHECK(qap_params_active(nullptr, got) && got.n_keep == 2000 + t);
            CHECK(qap_params_count(&params, -t) == -1);
            CHECK(std::strstr(qap_last_error(), (" " + std::to_string(-t)).c_str()) != nullptr);
            qap_override_pop();
        }
    });
    CHECK(qap_default_set(nullptr) == 0);
}

// The same scores come out of every thread as out of one.
static void test_scores(int rounds) {
    const int32_t    n = 24, d = 256;
    qap_params       params = qap_params_default();
    std::vector<int> errors = { QAP_ERROR_INT4, qap_id_from_name("error", "q4_0"), qap_id_from_name("error", "q6_K") };
    for (const int error : errors) {
        params.error = error;
        generator                rng(7);
        const std::vector<float> x = features(rng, (size_t) n * (size_t) d, 1.0f);
        std::vector<float>       want((size_t) n);
        qap_scores               alone = {};
        alone.total                    = want.data();
        CHECK(qap_score(x.data(), n, d, nullptr, nullptr, &params, nullptr, 1, &alone) == 0);
        in_threads([&](int) {
            for (int i = 0; i < rounds; i++) {
                std::vector<float>   s((size_t) n), cosines((size_t) n * (size_t) n);
                std::vector<int32_t> indices(5);
                qap_scores           out = {};
                out.total                = s.data();
                CHECK(qap_score(x.data(), n, d, nullptr, nullptr, &params, nullptr, 1, &out) == 0);
                CHECK(s == want);
                CHECK(qap_cosines(x.data(), n, d, nullptr, 1, cosines.data()) == 0);
                CHECK(qap_select(s.data(), cosines.data(), n, 5, QAP_SELECT_DPP, 0, indices.data()) == 0);
            }
        });
    }
}

static void test_tower(const char * path, int rounds) {
    qap_clip_text * tower = qap_clip_text_open(path, nullptr, 1);
    CHECK(tower != nullptr);
    const qap_clip_text_shape shape = qap_clip_text_get_shape(tower);
    const int32_t             ids[] = { 1, 0, 2 };
    std::vector<float>        want((size_t) shape.n_proj);
    CHECK(qap_clip_text_embed(tower, ids, 3, want.data()) == 0);
    in_threads([&](int) {
        for (int i = 0; i < rounds; i++) {
            std::vector<float> got((size_t) shape.n_proj);
            CHECK(qap_clip_text_embed(tower, ids, 3, got.data()) == 0);
            CHECK(got == want);
        }
    });
    qap_clip_text_free(tower);
}

// Planted, for tools/build/sanitize.py to see that reports are made: a counter without a lock.
static void race() {
    int count = 0;
    in_threads([&](int) {
        for (int i = 0; i < 1000; i++) {
            count++;
        }
    });
    std::printf("%d\n", count);
}

int main(int argc, char ** argv) {
    if (argc > 1 && std::strcmp(argv[1], "race") == 0) {
        race();
        return 0;
    }
    CHECK(argc == 3); // a text tower's file, rounds
    const int rounds = std::atoi(argv[2]);
    test_state(50 * rounds);
    test_scores(rounds);
    test_tower(argv[1], rounds);
    std::printf("%d threads: %d settings, %d scores, %d embeddings each\n", N_THREADS, 50 * rounds, 3 * rounds, rounds);
    return 0;
}
