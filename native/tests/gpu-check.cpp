// gpu-check.cpp: compares a ggml device with the CPU, and times it: scorers, encoder, selections, bytes, logits, answers.
// tools/build/gpu_check.sh builds and calls it; the last line of stdout is one JSON object, exit 1 when something differs.
#include "checks.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama.h"
#include "mirror-device.h"
#include "mtmd-helper.h"
#include "random-files.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>

static const char * USAGE =
    "usage: gpu-check --packaged FOLDER --work FOLDER [--device NAME] [--small] [--rounds N] [--threads N]\n"
    "                 [--skip-times] [--distort PER_MILLE] [--tag KEY=VALUE]... [--verbose]\n"
    "  --packaged  folder of the packaged model: tiny-llava-Q4_0.gguf, mmproj-f16.gguf, sample.png, sample.json\n"
    "  --work      where files with random weights are made, and found again (6 GB; 20 MB with --small)\n"
    "  --device    a ggml device; without it the first GPU, and where there is none Mirror0, the CPU behind memory of\n"
    "              its own\n"
    "  --small     small random models instead of CLIP-L/336 and a 7B\n"
    "  --distort   Mirror0 gives numbers that are wrong by so much, and the run has to fail\n";

void check_state::expect_at_most(const std::string & what, double value, double limit) {
    if (!(value <= limit)) {
        failures.push_back(what + ": expected at most " + std::to_string(limit) + ", got " + std::to_string(value));
        progress("FAILED " + failures.back());
    }
}

void check_state::expect(const std::string & what, bool holds) {
    if (!holds) {
        failures.push_back(what);
        progress("FAILED " + what);
    }
}

void progress(const std::string & text) {
    std::fprintf(stderr, "gpu-check: %s\n", text.c_str());
}

static bool verbose = false;

static void log_errors(ggml_log_level level, const char * text, void *) {
    if (verbose || level == GGML_LOG_LEVEL_ERROR) {
        std::fputs(text, stderr);
    }
}

struct arguments {
    std::string  packaged;
    std::string  work;
    std::string  device;
    bool         small   = false;
    bool         times   = true;
    int          rounds  = 5;
    int          threads = 4;
    int          distort = 0;
    ordered_json tags    = ordered_json::object();
};

static arguments read_arguments(int argc, char ** argv) {
    arguments  out;
    const auto fail = [](const std::string & why) {
        std::fprintf(stderr, "gpu-check: %s\n%s", why.c_str(), USAGE);
        std::exit(2);
    };
    const auto number = [&](const std::string & name, const std::string & text) {
        char *     end   = nullptr;
        const long value = std::strtol(text.c_str(), &end, 10);
        if (text.empty() || *end != '\0' || value < 1 || value > 1000) {
            fail(name + ": expected a number in 1..1000, got '" + text + "'");
        }
        return (int) value;
    };
    for (int i = 1; i < argc; i++) {
        const std::string name  = argv[i];
        const auto        value = [&]() -> std::string {
            if (i + 1 >= argc) {
                fail(name + " needs a value");
            }
            return argv[++i];
        };
        if (name == "--packaged") {
            out.packaged = value();
        } else if (name == "--work") {
            out.work = value();
        } else if (name == "--device") {
            out.device = value();
        } else if (name == "--small") {
            out.small = true;
        } else if (name == "--skip-times") {
            out.times = false;
        } else if (name == "--rounds") {
            out.rounds = number(name, value());
        } else if (name == "--threads") {
            out.threads = number(name, value());
        } else if (name == "--distort") {
            out.distort = number(name, value());
        } else if (name == "--verbose") {
            verbose = true;
        } else if (name == "--tag") {
            const std::string tag = value();
            const size_t      at  = tag.find('=');
            if (at == std::string::npos) {
                fail("--tag: expected KEY=VALUE, got '" + tag + "'");
            }
            out.tags[tag.substr(0, at)] = tag.substr(at + 1);
        } else {
            fail("unknown argument " + name);
        }
    }
    if (out.packaged.empty() || out.work.empty()) {
        fail("--packaged and --work are needed");
    }
    return out;
}

static ggml_backend_dev_t find_device(const std::string & name) {
    ggml_backend_dev_t device =
        name.empty() ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU) : ggml_backend_dev_by_name(name.c_str());
    if (device == nullptr && name.empty()) {
        device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_IGPU);
    }
    if (device == nullptr && (name.empty() || name == "Mirror0")) {
        mirror_register();
        device = ggml_backend_dev_by_name("Mirror0");
    }
    if (device == nullptr) {
        std::string names;
        for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
            names += std::string(i > 0 ? ", " : "") + ggml_backend_dev_name(ggml_backend_dev_get(i));
        }
        throw std::runtime_error("--device: expected one of " + names + ", Mirror0, got " + name);
    }
    return device;
}

static ordered_json describe(ggml_backend_dev_t device) {
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(device, &free, &total);
    return {
        { "name",               ggml_backend_dev_name(device)                               },
        { "description",        ggml_backend_dev_description(device)                        },
        { "backend",            ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)) },
        { "memory_total_bytes", total                                                       }
    };
}

static std::vector<std::string> sample_questions(const std::string & file) {
    std::ifstream            in(file);
    const ordered_json       sample = ordered_json::parse(in);
    std::vector<std::string> out;
    for (const auto & row : sample.at("questions")) {
        out.push_back(row.at("question").get<std::string>());
    }
    return out;
}

static int run(const arguments & args) {
    check_state state;
    state.device    = find_device(args.device);
    state.cpu       = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    state.n_threads = args.threads;
    state.rounds    = args.rounds;
    mirror_distort(1e-3f * (float) args.distort);
    progress(std::string("comparing ") + ggml_backend_dev_name(state.device) + " with the CPU");

    clip_shape     vision;
    language_shape language;
    if (args.small) {
        vision   = { 128, 4, 256, 4, 112, 14 };
        language = { 256, 2, 512, 4 };
    }
    const int         n_tokens = (vision.image / vision.patch) * (vision.image / vision.patch);
    const std::string size     = args.small ? "small" : "7b";
    const std::string model    = args.work + "/model-random-" + size + "-q4_0.gguf";
    const std::string tiny     = args.packaged + "/tiny-llava-Q4_0.gguf";
    const std::string f32      = args.work + "/mmproj-random-" + size + "-f32.gguf";
    const std::string f16      = args.work + "/mmproj-random-" + size + "-f16.gguf";
    progress("files with random weights");
    write_random_mmproj(f32, vision, language.n_embd, GGML_TYPE_F32);
    write_random_mmproj(f16, vision, language.n_embd, GGML_TYPE_F16);
    write_random_language(model, language, tiny, GGML_TYPE_Q4_0);

    const model_files packaged = { args.packaged + "/mmproj-f16.gguf", tiny };
    const auto        side     = (uint32_t) vision.image;
    // flash attention keeps keys and values in f16: off for the encoder that is to be f32 throughout
    const model_case random_f32 = {
        "random f32", { f32, model },
         side, false, 1e-6, 1e-2
    };
    const model_case random_f16 = {
        "random f16", { f16, model },
         side, true, 1e-3, 1e-2
    };
    const model_case packaged_f16 = { "packaged", packaged, 192, true, 1e-3, 1e-2 };

    ordered_json out = {
        { "check",  "gpu_check"            },
        { "device", describe(state.device) }
    };
    out["tags"]    = args.tags;
    out["size"]    = size;
    out["scorers"] = check_scorers(state, n_tokens, language.n_embd);
    out["models"]  = { check_model(state, random_f32), check_model(state, random_f16),
                       check_model(state, packaged_f16) };
    out["answers"] =
        check_answers(state, packaged, args.packaged + "/sample.png", sample_questions(args.packaged + "/sample.json"));
    out["choice"] = check_choice(state, packaged);
    if (args.times) {
        out["times"] = {
            { "scores", time_scores(state, n_tokens, language.n_embd, args.small ? 8 : 64) },
            { "model", time_model(state, random_f16) }
        };
    }
    out["failures"] = state.failures;
    out["ok"]       = state.failures.empty();
    std::cout << out.dump() << '\n';
    return state.failures.empty() ? 0 : 1;
}

int main(int argc, char ** argv) {
    const arguments args = read_arguments(argc, argv);
    qap_avoid_amx(); // before the CPU backend chooses its kernels
    llama_log_set(log_errors, nullptr);
    mtmd_helper_log_set(log_errors, nullptr);
    llama_backend_init();
    try {
        return run(args);
    } catch (const std::exception & err) {
        std::fprintf(stderr, "gpu-check: error: %s\n", err.what());
        return 1;
    }
}
