/* The loop that is measured, and the encoder that makes its input: an adaptive binary range coder with a 32-bit range, 16-bit
 * probabilities of a zero that move by a sixteenth, and the last 12 bits as context (Martin 1979; the carry as in LZMA). */
#include "hot.h"

enum { CONTEXTS = 1 << 12 };

WHIMBREL_EXPORT uint64_t encode(const uint8_t *bits, uint64_t count, uint8_t *out);
WHIMBREL_EXPORT void decode(const uint8_t *data, uint64_t count, uint8_t *out);
WHIMBREL_EXPORT void decode_hot(const uint8_t *data, uint64_t count, uint8_t *out);

uint64_t encode(const uint8_t *bits, uint64_t count, uint8_t *out)
{
    uint16_t zeros[CONTEXTS];
    uint64_t low = 0, length = 0, pending = 0;
    uint32_t width = UINT32_MAX, context = 0;
    uint8_t held = 0;
    int is_first = 1;

    for (int i = 0; i < CONTEXTS; i++) {
        zeros[i] = 1 << 15;
    }
    for (uint64_t i = 0; i < count + 5; i++) {
        if (i < count) {
            uint32_t zero = zeros[context], bound = (width >> 16) * zero;
            if (bits[i]) {
                low += bound;
                width -= bound;
                zeros[context] = (uint16_t)(zero - (zero >> 4));
            } else {
                width = bound;
                zeros[context] = (uint16_t)(zero + ((65536 - zero) >> 4));
            }
            context = (context << 1 | bits[i]) & (CONTEXTS - 1);
        } else {
            width = 0; /* push out what is held */
        }
        while (width < UINT32_C(1) << 24) {
            if (low < UINT64_C(0xFF000000) || low > UINT32_MAX) {
                uint8_t carry = (uint8_t)(low >> 32);
                if (!is_first) {
                    out[length++] = (uint8_t)(held + carry);
                }
                for (; pending; pending--) {
                    out[length++] = (uint8_t)(0xFF + carry);
                }
                held = (uint8_t)(low >> 24);
                is_first = 0;
            } else {
                pending++;
            }
            low = low << 8 & UINT32_MAX;
            width = i < count ? width << 8 : UINT32_MAX;
        }
    }
    return length;
}

static WHIMBREL_INLINE void decode_body(const uint8_t *data, uint64_t count, uint8_t *out)
{
    uint16_t zeros[CONTEXTS];
    uint32_t width = UINT32_MAX, context = 0;
    uint32_t code = (uint32_t)data[0] << 24 | (uint32_t)data[1] << 16 | (uint32_t)data[2] << 8 | data[3];

    data += 4;
    for (int i = 0; i < CONTEXTS; i++) {
        zeros[i] = 1 << 15;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint32_t zero = zeros[context], bound = (width >> 16) * zero, bit;
        if (code < bound) {
            bit = 0;
            width = bound;
            zeros[context] = (uint16_t)(zero + ((65536 - zero) >> 4));
        } else {
            bit = 1;
            code -= bound;
            width -= bound;
            zeros[context] = (uint16_t)(zero - (zero >> 4));
        }
        while (width < UINT32_C(1) << 24) {
            width <<= 8;
            code = code << 8 | *data++;
        }
        context = (context << 1 | bit) & (CONTEXTS - 1);
        out[i] = (uint8_t)bit;
    }
}

void decode(const uint8_t *data, uint64_t count, uint8_t *out) { decode_body(data, count, out); }

static WHIMBREL_INLINE void decode_hot_body(const uint8_t *data, uint64_t count, uint8_t *out)
{
    decode_body(data, count, out);
}
WHIMBREL_HOT(void, decode_hot, (const uint8_t *data, uint64_t count, uint8_t *out), (data, count, out))
