# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# The loop of coder.c in Cython. Cython writes C, so what differs from C by hand is what surrounds the loop.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


def decode(const uint8_t[::1] data, uint64_t count, uint8_t[::1] out):
    cdef uint16_t[4096] zeros
    cdef uint32_t width = 0xFFFFFFFF, context = 0, zero, bound, bit
    cdef uint32_t code = <uint32_t>data[0] << 24 | <uint32_t>data[1] << 16 | <uint32_t>data[2] << 8 | data[3]
    cdef uint64_t position = 4, i
    with nogil:
        for i in range(4096):
            zeros[i] = 1 << 15
        for i in range(count):
            zero = zeros[context]
            bound = (width >> 16) * zero
            if code < bound:
                bit = 0
                width = bound
                zeros[context] = <uint16_t>(zero + ((65536 - zero) >> 4))
            else:
                bit = 1
                code -= bound
                width -= bound
                zeros[context] = <uint16_t>(zero - (zero >> 4))
            while width < 1 << 24:
                width <<= 8
                code = code << 8 | data[position]
                position += 1
            context = (context << 1 | bit) & 4095
            out[i] = <uint8_t>bit
