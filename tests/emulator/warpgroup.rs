//! `faults/warpgroup.cu` with its reference: the copy engine and products of warpgroups.

use std::ffi::{c_int, c_void};

use half::{bf16, f16};

use super::kernels::{Outcome, is_product, judge, numbers};
use super::library::{Device, check};

/// Aligned as the driver wants it.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
struct Map([u64; 16]);

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    a: Map,
    b: Map,
    c: u64,
    m: u32,
    n: u32,
    k: u32,
    reserved: [u32; 27],
}

/// A map of `[rows][columns]` 16-bit numbers whose boxes have 64 columns.
fn map(device: &Device, is_bf16: bool, address: u64, (rows, columns): (usize, usize), box_rows: u32) -> Map {
    type Encode = extern "C" fn(
        *mut Map,
        c_int,
        u32,
        *mut c_void,
        *const u64,
        *const u64,
        *const u32,
        *const u32,
        c_int,
        c_int,
        c_int,
        c_int,
    ) -> c_int;
    let encode: Encode = device.function(c"cuTensorMapEncodeTiled");
    let mut map = Map([0; 16]);
    let sizes = [columns as u64, rows as u64, 1];
    let strides = [columns as u64 * 2, (columns * rows) as u64 * 2];
    let code = encode(
        &mut map,
        if is_bf16 { 9 } else { 6 },
        3,
        address as *mut c_void,
        sizes.as_ptr(),
        strides.as_ptr(),
        [64, box_rows, 1].as_ptr(),
        [1u32; 3].as_ptr(),
        0,
        3,
        0,
        0,
    );
    check(code).expect("a tensor map");
    map
}

/// One 16-bit matrix product.
pub fn multiply(device: &Device, name: &str, (m, n, k): (usize, usize, usize)) -> Outcome {
    let (is_bf16, rows) = (!name.ends_with("_f16"), name.contains("_rows"));
    let round: fn(f32) -> (u16, f64) = if is_bf16 {
        |v| (bf16::from_f32(v).to_bits(), bf16::from_f32(v).to_f64())
    } else {
        |v| (f16::from_f32(v).to_bits(), f16::from_f32(v).to_f64())
    };
    let (a_bits, a): (Vec<u16>, Vec<f64>) = numbers(1, m * k).into_iter().map(round).unzip();
    let (b_bits, b): (Vec<u16>, Vec<f64>) = numbers(2, k * n).into_iter().map(round).unzip();
    let (a_at, b_at) = (device.put(&a_bits), device.put(&b_bits));
    let c_at = device.allocate((m + 1) * n * 4).expect("there is memory");
    let b_map =
        if rows { map(device, is_bf16, b_at, (n, k), 128) } else { map(device, is_bf16, b_at, (k, n), 64) };
    let a_map = map(device, is_bf16, a_at, (m, k), 64);
    let args = Args { a: a_map, b: b_map, c: c_at, m: m as u32, n: n as u32, k: k as u32, reserved: [0; 27] };
    let grid = [n.div_ceil(128) as u32, m.div_ceil(64) as u32];
    let result = device.launch(device.kernel("warpgroup", name), (grid, 160, 2 * 24576), &args);
    let result = result.and_then(|()| device.read::<f32>(c_at, (m + 1) * n));
    let b_at_index = |j: usize, l: usize| if rows { b[j * k + l] } else { b[l * n + j] };
    let term = |i: usize, j: usize, l: usize| a[i * k + l] * b_at_index(j, l);
    let outcome = judge(device, result.map(|c| is_product(&c, (m, n, k), term)));
    device.free_all(&[a_at, b_at, c_at]);
    outcome
}
