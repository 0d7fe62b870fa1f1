//! The loop of coder.c in Rust, as a library for ctypes; slices, so that every access to the data is checked.
use std::slice::{from_raw_parts, from_raw_parts_mut};

/// # Safety
/// `data` has `length` bytes, and `out` has room for `count`.
#[no_mangle]
pub unsafe extern "C" fn decode(data: *const u8, length: u64, count: u64, out: *mut u8) {
    run(from_raw_parts(data, length as usize), from_raw_parts_mut(out, count as usize));
}

fn run(data: &[u8], out: &mut [u8]) {
    let mut zeros = [1u16 << 15; 4096];
    let mut width = u32::MAX;
    let mut context = 0usize;
    let mut code = u32::from_be_bytes([data[0], data[1], data[2], data[3]]);
    let mut position = 4;
    for result in out.iter_mut() {
        let zero = u32::from(zeros[context]);
        let bound = (width >> 16) * zero;
        let bit = if code < bound {
            width = bound;
            zeros[context] = (zero + ((65536 - zero) >> 4)) as u16;
            0usize
        } else {
            code -= bound;
            width -= bound;
            zeros[context] = (zero - (zero >> 4)) as u16;
            1usize
        };
        while width < 1 << 24 {
            width <<= 8;
            code = code << 8 | u32::from(data[position]);
            position += 1;
        }
        context = (context << 1 | bit) & 4095;
        *result = bit as u8;
    }
}
