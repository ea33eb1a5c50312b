// unicode.h: what CLIP's tokenizer needs to know of Unicode: UTF-8, NFC, lower case, letters, digits, white space.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

using qap_codes = std::vector<uint32_t>;

// code points of a text; bytes that are no UTF-8 become U+FFFD
qap_codes qap_utf8_decode(const char * text, size_t n_bytes);

void qap_utf8_append(std::string & text, uint32_t code);

// canonical composition (NFC) and lower case, character by character: a final sigma is lowered as any other
qap_codes qap_nfc(const qap_codes & codes);
qap_codes qap_lower(const qap_codes & codes);

bool qap_is_letter(uint32_t code); // general category L
bool qap_is_number(uint32_t code); // general category N
bool qap_is_space(uint32_t code);  // property White_Space
