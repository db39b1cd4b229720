//! Memory that is needed soon, asked for early.
//!
//! What was not used for long lies far from the processor, a hundred nanoseconds and more. Who knows what it will touch
//! next, and has other work until then, need not wait for it.

use std::ptr;

/// What a processor fetches at once, in bytes.
const LINE_BYTES: usize = 64;

/// Has the processor fetch `value` into its caches while the program goes on, without what it points to. On
/// processors other than x86-64 it does nothing.
#[inline]
pub fn prefetch<T>(value: &T) {
    let start = ptr::from_ref(value);
    let into_line = start.addr() % LINE_BYTES;
    for number in 0..(into_line + size_of::<T>()).div_ceil(LINE_BYTES) {
        let line = start.wrapping_byte_sub(into_line).wrapping_byte_add(number * LINE_BYTES);
        #[cfg(target_arch = "x86_64")]
        #[expect(
            unsafe_code,
            reason = "a full tree of 100,000 beginnings is a quarter faster for it, see decision 14"
        )]
        // SAFETY: the function is unsafe because it takes a pointer. A prefetch is a hint: it reads and writes nothing
        // that the program could see, and it faults on no address, whatever is there. It is part of SSE, which every
        // x86-64 has.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}
