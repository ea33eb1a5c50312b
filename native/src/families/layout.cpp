// layout.cpp: see layout.h. One row of the table for each projector that was proven against transformers.
#include "families/layout.h"

#include "clip-impl.h"
#include "clip-model.h"
#include "families/forced.h"
#include "families/letterbox.h"
#include "gate/gate.h"
#include "qap-plan.h"
#include "qap.h"

#include <algorithm>

enum class class_token { as_stored, first, last, none };

struct projector_row {
    projector_type projector;
    qap_merging    merging;
    class_token    cls;
};

static const projector_row PROJECTORS[] = {
    { PROJECTOR_TYPE_MLP,             qap_merging::none,        class_token::as_stored },
    { PROJECTOR_TYPE_MLP_NORM,        qap_merging::none,        class_token::as_stored },
    { PROJECTOR_TYPE_IDEFICS3,        qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_GEMMA3,          qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_GEMMA4V,         qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_GEMMA4UV,        qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_LFM2,            qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_INTERNVL,        qap_merging::block,       class_token::first     },
    { PROJECTOR_TYPE_LLAMA4,          qap_merging::block,       class_token::last      },
    { PROJECTOR_TYPE_PIXTRAL,         qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_LIGHTONOCR,      qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_JANUS_PRO,       qap_merging::none,        class_token::none      },
    { PROJECTOR_TYPE_MINICPMV4_6,     qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_GRANITE4_VISION, qap_merging::none,        class_token::none      },
    { PROJECTOR_TYPE_QWEN2VL,         qap_merging::consecutive, class_token::none      },
    { PROJECTOR_TYPE_QWEN25VL,        qap_merging::consecutive, class_token::none      },
    { PROJECTOR_TYPE_QWEN3VL,         qap_merging::consecutive, class_token::none      },
    { PROJECTOR_TYPE_GLM4V,           qap_merging::consecutive, class_token::none      },
    { PROJECTOR_TYPE_PADDLEOCR,       qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_HUNYUANVL,       qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_EXAONE4_5,       qap_merging::consecutive, class_token::none      },
    { PROJECTOR_TYPE_KIMIVL,          qap_merging::block,       class_token::none      },
    { PROJECTOR_TYPE_KIMIK25,         qap_merging::block,       class_token::none      },
};

static const projector_row * find_projector(int projector) {
    for (const projector_row & row : PROJECTORS) {
        if (row.projector == projector) {
            return &row;
        }
    }
    return nullptr;
}

bool qap_tower_windows(int projector) {
    return projector == PROJECTOR_TYPE_QWEN25VL || projector == PROJECTOR_TYPE_EXAONE4_5;
}

bool qap_projector_compared(int projector) {
    return find_projector(projector) != nullptr;
}

const char * qap_why_not_prunable(const clip_model & model) {
    if (qap_projector_compared(model.proj_type) || model.hparams.qap_forced) {
        return nullptr;
    }
    if (qap_projector_can_be_forced(model.proj_type)) {
        return "this family was not compared with its original here; run this model without pruning, or prune it "
               "nevertheless with --force-family (force_family=True, QAP_FORCE_FAMILY=1)";
    }
    switch (model.proj_type) {
        case PROJECTOR_TYPE_MINICPMV:
            return "the resampler's queries (projector resampler) have no place in the picture; run it without pruning";
        case PROJECTOR_TYPE_DEEPSEEKOCR2:
            return "the queries of the encoder (deepseekocr2) have no place in the picture; run it without pruning";
        default: return "this projector is not supported for pruning; run this model without pruning";
    }
}

// Whether the attention of its layers says something of each token. Granite 4's projector makes tokens of places, not of
// patches; Gemma 4's encoder without a tower has no layers.
static bool attends(int projector) {
    return projector != PROJECTOR_TYPE_GRANITE4_VISION && projector != PROJECTOR_TYPE_GEMMA4UV;
}

const char * qap_projector_name(const char * table, int32_t index) {
    const std::string which = table;
    for (const auto & [projector, name] : PROJECTOR_TYPE_NAMES) {
        const bool found = which == "layout"    ? find_projector(projector) != nullptr
                           : which == "resize"  ? qap_projector_stretched(projector)
                           : which == "gate"    ? qap_gate_has_rules(name)
                           : which == "attends" ? find_projector(projector) != nullptr && attends(projector)
                           : which == "forced"  ? qap_projector_can_be_forced(projector)
                                                : false;
        if (found && index-- == 0) {
            return name.c_str();
        }
    }
    return nullptr;
}

int64_t qap_planes_of(const clip_model & model) {
    const bool granite = model.proj_type == PROJECTOR_TYPE_GRANITE4_VISION;
    return granite ? std::max<int64_t>(1, (int64_t) model.qf_proj_blocks.size()) : 1 + model.n_deepstack_layers;
}

qap_grid qap_granite_grid(const clip_hparams & hparams, const clip_image_f32 & image) {
    qap_grid grid;
    if (hparams.downsample_window_side < 1 || hparams.patch_size < 1) {
        return grid;
    }
    const int side = image.nx() / hparams.patch_size / hparams.downsample_window_side * hparams.downsample_query_side;
    grid.n_base    = (int64_t) side * side;
    if (image.anyres.is_tiled()) {
        int left = 0, top = 0, width = 0, lines = 0;
        clip_anyres_unpad(
            image.anyres.grid_x * side, image.anyres.grid_y * side, image.anyres.orig_nx, image.anyres.orig_ny, left,
            top, width, lines);
        grid.width = width;
        grid.lines = lines;
    }
    return grid;
}

// Facts: granite4-vision.cpp, clip_n_output_tokens().
static qap_layout granite_layout(const clip_model & model, const clip_image_f32 & image) {
    const qap_grid grid = qap_granite_grid(model.hparams, image);
    qap_layout     layout;
    layout.first_token = grid.n_base;
    layout.n_base      = grid.n_base;
    layout.line_length = grid.width;
    layout.n_tokens    = grid.n_base + grid.width * grid.lines;
    layout.n_patches   = layout.n_tokens;
    layout.n_planes    = qap_planes_of(model);
    layout.attention   = false;
    return layout;
}

// Pixels of a side of what the last layers see: MiniCPM-V 4.6 merges its patches two by two between two layers.
static int patch_of(const clip_model & model) {
    const bool merged = model.proj_type == PROJECTOR_TYPE_MINICPMV4_6 && model.hparams.n_merge > 2;
    return model.hparams.patch_size * (merged ? 2 : 1);
}

qap_layout qap_layout_of(const clip_model & model, const clip_image_f32 & image) {
    const clip_hparams &  hparams = model.hparams;
    const projector_row * row     = find_projector(model.proj_type);
    qap_layout            layout;
    if (hparams.qap_forced && hparams.patch_size > 0) {
        return qap_forced_layout(model, image);
    }
    if (row == nullptr || hparams.patch_size < 1) {
        return layout;
    }
    if (model.proj_type == PROJECTOR_TYPE_GRANITE4_VISION) {
        return granite_layout(model, image);
    }
    const int patch           = patch_of(model);
    layout.n_patches_x        = image.nx() / patch;
    const int64_t n_patches_y = image.ny() / patch;
    layout.n_patches          = layout.n_patches_x * n_patches_y;
    layout.merging            = row->merging;
    if (row->merging == qap_merging::consecutive) {
        layout.n_merge = 2; // what their graphs are written for
    } else if (row->merging == qap_merging::block) {
        layout.n_merge = std::max(1, hparams.n_merge * hparams.patch_size / patch);
    }
    const int64_t lines  = n_patches_y / layout.n_merge;
    const int64_t length = layout.n_patches_x / layout.n_merge;
    layout.n_tokens      = lines * length;
    layout.n_planes      = qap_planes_of(model);
    layout.windows       = qap_tower_windows(model.proj_type) && hparams.n_wa_pattern > 0;
    if (model.proj_type == PROJECTOR_TYPE_PIXTRAL && model.token_embd_img_break != nullptr && lines > 1) {
        layout.line_length = length;
    } else if (model.proj_type == PROJECTOR_TYPE_HUNYUANVL) {
        layout.line_length = length; // a row before the first line, one after each, and one at the end
        layout.first_token = 1;
    }
    if (model.class_embedding != nullptr && row->cls != class_token::none) {
        // upstream's order has it in the last position (002-llava-encoder.patch, 003-internvl-class-token.patch)
        const bool first = row->cls != class_token::last && !qap_stock_encoder();
        layout.cls_row   = first ? 0 : layout.n_patches;
        // stock LLaVA reads positions 1 ... n although the class token is the last of them
        layout.first_row = first || row->cls == class_token::as_stored ? 1 : 0;
    }
    // stock Llama 4 gives its tokens column by column, and sides that do not divide are padded
    const bool divides = layout.n_patches_x % layout.n_merge == 0 && n_patches_y % layout.n_merge == 0;
    layout.attention =
        divides && attends(model.proj_type) && !(model.proj_type == PROJECTOR_TYPE_LLAMA4 && qap_stock_encoder());
    return layout;
}

ggml_tensor * qap_build_tokens(ggml_context * ctx, ggml_tensor * rows, const qap_layout & layout) {
    const int64_t width  = rows->ne[0];
    const int64_t n_embd = width / layout.n_planes;
    ggml_tensor * x      = ggml_reshape_2d(ctx, rows, width, ggml_nelements(rows) / width);
    if (layout.line_length > 0) {
        const int64_t in_lines = layout.n_tokens - layout.n_base;
        ggml_tensor * grid     = ggml_view_3d(
            ctx, x, n_embd, layout.line_length, in_lines / layout.line_length, x->nb[1],
            x->nb[1] * (layout.line_length + 1), x->nb[1] * layout.first_token);
        grid = ggml_reshape_2d(ctx, ggml_cont(ctx, grid), n_embd, in_lines);
        x    = layout.n_base > 0
                   ? ggml_concat(ctx, ggml_view_2d(ctx, x, n_embd, layout.n_base, x->nb[1], 0), grid, /* dim */ 1)
                   : grid;
    } else if (layout.n_planes > 1) {
        x = ggml_cont(ctx, ggml_view_2d(ctx, x, n_embd, layout.n_tokens, x->nb[1], 0));
    }
    return x;
}

ggml_tensor * qap_build_pooled(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * signal, const qap_layout & layout) {
    const size_t  skip  = (size_t) layout.first_row * sizeof(float);
    const int64_t n     = layout.n_merge;
    ggml_tensor * means = ggml_cont(ctx, ggml_view_1d(ctx, signal, layout.n_patches, skip));
    if (layout.merging == qap_merging::block && n > 1) {
        const int64_t length = layout.n_patches_x / n;
        means                = ggml_reshape_4d(ctx, means, n, length, n, layout.n_tokens / length);
        means                = ggml_cont(ctx, ggml_permute(ctx, means, 0, 2, 1, 3)); // [n, n, length, lines]
    }
    if (layout.merging != qap_merging::none && n > 1) {
        means = ggml_sum_rows(ctx, ggml_reshape_2d(ctx, means, n * n, layout.n_tokens)); // [1, n_tokens]
        means = ggml_scale(ctx, means, 1.0f / (float) (n * n));
    }
    if (layout.windows) {
        ggml_tensor * order = ggml_graph_get_tensor(gf, "window_idx");
        if (order == nullptr) {
            return nullptr;
        }
        means = ggml_get_rows(ctx, ggml_reshape_2d(ctx, means, 1, layout.n_tokens), order);
    }
    return ggml_reshape_1d(ctx, means, layout.n_tokens);
}

// Pixels of a side of what becomes a token.
static int64_t cell_of(const clip_model & model, const qap_layout & layout) {
    return patch_of(model) * layout.n_merge;
}

std::array<float, 4> qap_find_content(const clip_model & model, const clip_image_f32 & image) {
    const qap_layout layout = qap_layout_of(model, image);
    if (layout.n_patches_x < layout.n_merge) {
        return {};
    }
    const qap_area & found = image.qap_content;
    const qap_area   area  = found.padded ? found : qap_area{ true, 0, 0, image.nx(), image.ny() };
    const auto       cell  = (float) cell_of(model, layout);
    return { (float) area.x / cell, (float) area.y / cell, (float) area.width / cell, (float) area.height / cell };
}

std::vector<int32_t> qap_find_padding(const clip_model & model, const clip_image_f32 & image) {
    const qap_layout layout = qap_layout_of(model, image);
    if (!layout.attention || layout.n_tokens < 1) {
        return {};
    }
    const auto columns = (int32_t) (layout.n_patches_x / layout.n_merge);
    const auto cell    = (int32_t) cell_of(model, layout);
    return qap_padding_tokens(image.qap_content, cell, columns, (int32_t) layout.n_tokens / columns);
}

qap_window qap_window_of(const qap_plan & plan, const qap_layout & layout) {
    const std::vector<int32_t> real = plan.padding.empty() ? std::vector<int32_t>() : plan.real_tokens();
    if (real.empty()) {
        return {}; // no padding; or nothing else, and then no token is kept whatever it scores
    }
    qap_window window;
    window.columns = layout.n_patches_x / layout.n_merge;
    window.left    = real.front() % window.columns;
    window.top     = real.front() / window.columns;
    window.width   = real.back() % window.columns - window.left + 1;
    window.lines   = real.back() / window.columns - window.top + 1;
    return window;
}

ggml_tensor * qap_build_window(ggml_context * ctx, ggml_tensor * x, const qap_window & window) {
    if (window.lines == 0) {
        return x;
    }
    const size_t  line = x->nb[1] * (size_t) window.columns, start = x->nb[1] * (size_t) window.left;
    ggml_tensor * part =
        ggml_view_3d(ctx, x, x->ne[0], window.width, window.lines, x->nb[1], line, line * (size_t) window.top + start);
    return ggml_reshape_2d(ctx, ggml_cont(ctx, part), x->ne[0], window.width * window.lines);
}
