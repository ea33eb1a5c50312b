// around-picture.cpp: what stands before and after a picture: the blank lines of Gemma 3 and 3n (020-gemma3-breaks.patch), the
// words of Janus, and none for LightOnOCR (021-words.patch). Gemma's vocabulary has one token for each run of line breaks, so
// the blank lines are put into the texts beside the picture before those are tokenized: "user\n" and a picture give one token
// for three line breaks.
//
// Facts: transformers 5.24, full_image_sequence in models/gemma3/processing_gemma3.py and gemma3n/processing_gemma3n.py.
// Gemma 4's processor writes none. replace_image_token() in models/janus/processing_janus.py and
// models/lighton_ocr/processing_lighton_ocr.py.
#include "clip-impl.h"
#include "mtmd-internal.h"
#include "qap-hooks.h"
#include "qap.h"

#include <string>
#include <utility>

static const char * const BLANK_LINE = "\n\n";

void qap_hook_breaks(const clip_ctx * ctx, std::vector<mtmd_internal_part> & parts) {
    if (ctx == nullptr || qap_stock_encoder()) {
        return;
    }
    const projector_type projector = clip_get_projector_type(ctx);
    if (projector != PROJECTOR_TYPE_GEMMA3 && projector != PROJECTOR_TYPE_GEMMA3NV) {
        return;
    }
    std::vector<mtmd_internal_part> found;
    bool                            after = false; // the part before is a picture
    // the text that the next blank line goes into: an empty one where no text stands between two media
    const auto text = [&]() -> std::string & {
        if (found.empty() || found.back().bitmap != nullptr) {
            found.push_back({ "", nullptr });
        }
        return found.back().text;
    };
    for (mtmd_internal_part & part : parts) {
        const bool picture = part.bitmap != nullptr && !mtmd_bitmap_is_audio(part.bitmap);
        if (part.bitmap == nullptr) {
            part.text.insert(0, after ? BLANK_LINE : "");
        } else {
            if (after) {
                text() += BLANK_LINE;
            }
            if (picture) {
                text() += BLANK_LINE;
            }
        }
        found.push_back(std::move(part));
        after = picture;
    }
    if (after) {
        text() += BLANK_LINE;
    }
    parts = std::move(found);
}

void qap_hook_words(int projector, std::string & before, std::string & after) {
    if (qap_stock_encoder()) {
        return;
    }
    if (projector == PROJECTOR_TYPE_LIGHTONOCR) {
        before.clear();
        after.clear();
    } else if (projector == PROJECTOR_TYPE_JANUS_PRO) {
        before = "<begin_of_image>";
        after  = "<end_of_image>";
    }
}
