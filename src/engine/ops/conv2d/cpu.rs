use super::Conv2dParams;
use crate::engine::activation::Activation;
use crate::engine::tensor::{Dst, Src};
use rayon::prelude::*;
pub fn pack_forward(_p: &Conv2dParams, w: &[f32], packed: &mut [f32]) {
    packed.copy_from_slice(w)
}
pub fn pack_backward(_p: &Conv2dParams, w: &[f32], packed: &mut [f32]) {
    packed.copy_from_slice(w)
}
pub enum Epilogue<'a> {
    Raw,
    Bias { bias: &'a [f32] },
    Stats { partials: &'a mut [f64] },
    Apply { scale: &'a [f32], shift: &'a [f32], activation: Activation, residual: Option<Src<'a>> },
}
pub fn stats_partials_len(p: &Conv2dParams, _n: usize, _h: usize, _w: usize) -> usize {
    2 * p.c_out
}
pub fn finish_stats(
    p: &Conv2dParams,
    _n: usize,
    _h: usize,
    _w: usize,
    s: &[f64],
    mean: &mut [f32],
    var: &mut [f32],
) {
    for c in 0..p.c_out {
        mean[c] = s[c] as f32;
        var[c] = s[p.c_out + c] as f32;
    }
}
pub fn forward(p: &Conv2dParams, x: Src, w: &[f32], y: Dst, e: Epilogue) {
    let v = y.view;
    let (k, pad) = (p.kernel as isize, p.pad as isize);
    (0..v.n * v.h).into_par_iter().for_each(|r| {
        let (n, oy) = (r / v.h, r % v.h);
        for ox in 0..v.w {
            unsafe {
                let out = y.pixel(n, oy as isize, ox as isize);
                out.fill(0.0);
                for ky in 0..k {
                    for kx in 0..k {
                        let px = x.pixel(
                            n,
                            (oy * p.stride) as isize + ky - pad,
                            (ox * p.stride) as isize + kx - pad,
                        );
                        for (ci, xv) in px.iter().enumerate() {
                            let wr = &w[((ky * k + kx) as usize * p.c_in + ci) * p.c_out..][..p.c_out];
                            for (o, wv) in out.iter_mut().zip(wr) {
                                *o += xv * wv;
                            }
                        }
                    }
                }
                match &e {
                    Epilogue::Bias { bias } => {
                        for (o, b) in out.iter_mut().zip(*bias) {
                            *o += b
                        }
                    }
                    Epilogue::Apply { scale, shift, activation, residual } => {
                        let res = residual.map(|r| r.pixel(n, oy as isize, ox as isize));
                        for c in 0..out.len() {
                            out[c] =
                                activation.value(out[c] * scale[c] + shift[c]) + res.map_or(0.0, |r| r[c]);
                        }
                    }
                    _ => {}
                }
            }
        }
    });
    if let Epilogue::Stats { partials } = e {
        let count = (v.n * v.h * v.w) as f64;
        for c in 0..v.c {
            let all = || {
                (0..v.n * v.h * v.w).map(|i| unsafe {
                    f64::from(
                        *y.data.add(v.at(i / (v.h * v.w), (i / v.w % v.h) as isize, (i % v.w) as isize) + c),
                    )
                })
            };
            let m = all().sum::<f64>() / count;
            partials[c] = m;
            partials[v.c + c] = all().map(|a| (a - m) * (a - m)).sum::<f64>() / count;
        }
    }
}
pub fn backward_data(p: &Conv2dParams, dy: Src, w: &[f32], dx: Dst, accumulate: bool) {
    let v = dx.view;
    let (k, pad, s) = (p.kernel as isize, p.pad as isize, p.stride as isize);
    (0..v.n * v.h).into_par_iter().for_each(|r| {
        let (n, iy) = (r / v.h, (r % v.h) as isize);
        for ix in 0..v.w as isize {
            unsafe {
                let out = dx.pixel(n, iy, ix);
                if !accumulate {
                    out.fill(0.0)
                }
                for ky in 0..k {
                    for kx in 0..k {
                        let (ty, tx) = (iy + pad - ky, ix + pad - kx);
                        if ty < 0
                            || tx < 0
                            || ty % s != 0
                            || tx % s != 0
                            || ty / s >= dy.view.h as isize
                            || tx / s >= dy.view.w as isize
                        {
                            continue;
                        }
                        let d = dy.pixel(n, ty / s, tx / s);
                        for (ci, o) in out.iter_mut().enumerate() {
                            let wr = &w[((ky * k + kx) as usize * p.c_in + ci) * p.c_out..][..p.c_out];
                            *o += wr.iter().zip(d).map(|(a, b)| a * b).sum::<f32>();
                        }
                    }
                }
            }
        }
    });
}
pub fn backward_weight(p: &Conv2dParams, x: Src, dy: Src, dw: &mut [f32], _ws: &mut [f32]) {
    let v = dy.view;
    let (k, pad) = (p.kernel, p.pad as isize);
    dw.par_chunks_mut(p.c_in * p.c_out).enumerate().for_each(|(tap, dw)| {
        for i in 0..v.n * v.h * v.w {
            let (n, oy, ox) = (i / (v.h * v.w), i / v.w % v.h, i % v.w);
            unsafe {
                let px = x.pixel(
                    n,
                    (oy * p.stride + tap / k) as isize - pad,
                    (ox * p.stride + tap % k) as isize - pad,
                );
                let d = dy.pixel(n, oy as isize, ox as isize);
                for (ci, xv) in px.iter().enumerate() {
                    for (o, dv) in dw[ci * p.c_out..][..p.c_out].iter_mut().zip(d) {
                        *o += xv * dv;
                    }
                }
            }
        }
    });
}
pub fn backward_bias(_p: &Conv2dParams, dy: Src, db: &mut [f32]) {
    let v = dy.view;
    for i in 0..v.n * v.h * v.w {
        let d = unsafe { dy.pixel(i / (v.h * v.w), (i / v.w % v.h) as isize, (i % v.w) as isize) };
        for (o, d) in db.iter_mut().zip(d) {
            *o += d;
        }
    }
}
