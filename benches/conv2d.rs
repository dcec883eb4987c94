//! Speed of the convolutions of yolov8n, pass by pass, against the peak of fused multiply-adds.
//!
//!     cargo bench --bench conv2d -- [imgsz=320] [batch=8] [threads=1,2] [repeats=3] [only=80-80]
//!
//! Prints GFLOP/s of each shape (the best of the repeats), and milliseconds of the whole network:
//! time times the number of such convolutions.

use std::time::Instant;

use boxwright::engine::ops::conv2d::{Conv2dParams, cpu};
use boxwright::engine::simd::{self, Kernel, Simd};
use boxwright::engine::tensor::{Dst, Src, View};

/// One shape: channels in and out, kernel, stride, stride of the input map on the image, how many
/// there are, channels of the buffer that the input is a slice of.
struct Shape(usize, usize, usize, usize, usize, usize, usize);

/// The convolutions of yolov8n with 80 classes.
const YOLOV8N: &[Shape] = &[
    Shape(3, 16, 3, 2, 1, 1, 3),
    Shape(16, 32, 3, 2, 2, 1, 16),
    Shape(32, 32, 1, 1, 4, 1, 32),
    Shape(16, 16, 3, 1, 4, 1, 48),
    Shape(16, 16, 3, 1, 4, 1, 16),
    Shape(48, 32, 1, 1, 4, 1, 48),
    Shape(32, 64, 3, 2, 4, 1, 32),
    Shape(64, 64, 1, 1, 8, 1, 64),
    Shape(32, 32, 3, 1, 8, 3, 128),
    Shape(32, 32, 3, 1, 8, 3, 32),
    Shape(128, 64, 1, 1, 8, 1, 128),
    Shape(192, 64, 1, 1, 8, 1, 192),
    Shape(96, 64, 1, 1, 8, 1, 96),
    Shape(64, 128, 3, 2, 8, 1, 64),
    Shape(64, 64, 3, 2, 8, 1, 64),
    Shape(128, 128, 1, 1, 16, 1, 128),
    Shape(64, 64, 3, 1, 16, 4, 256),
    Shape(64, 64, 3, 1, 16, 4, 64),
    Shape(256, 128, 1, 1, 16, 1, 256),
    Shape(384, 128, 1, 1, 16, 1, 384),
    Shape(192, 128, 1, 1, 16, 3, 192),
    Shape(128, 256, 3, 2, 16, 1, 128),
    Shape(128, 128, 3, 2, 16, 1, 128),
    Shape(256, 256, 1, 1, 32, 1, 256),
    Shape(128, 128, 3, 1, 32, 2, 384),
    Shape(128, 128, 3, 1, 32, 2, 128),
    Shape(384, 256, 1, 1, 32, 3, 384),
    Shape(256, 128, 1, 1, 32, 1, 256),
    Shape(512, 256, 1, 1, 32, 1, 512),
    Shape(64, 64, 3, 1, 8, 2, 64),
    Shape(64, 64, 1, 1, 8, 1, 64),
    Shape(64, 80, 3, 1, 8, 1, 64),
    Shape(80, 80, 3, 1, 8, 1, 80),
    Shape(80, 80, 1, 1, 8, 1, 80),
    Shape(128, 64, 3, 1, 16, 1, 128),
    Shape(64, 64, 3, 1, 16, 1, 64),
    Shape(64, 64, 1, 1, 16, 1, 64),
    Shape(128, 80, 3, 1, 16, 1, 128),
    Shape(80, 80, 3, 1, 16, 1, 80),
    Shape(80, 80, 1, 1, 16, 1, 80),
    Shape(256, 64, 3, 1, 32, 1, 256),
    Shape(64, 64, 3, 1, 32, 1, 64),
    Shape(64, 64, 1, 1, 32, 1, 64),
    Shape(256, 80, 3, 1, 32, 1, 256),
    Shape(80, 80, 3, 1, 32, 1, 80),
    Shape(80, 80, 1, 1, 32, 1, 80),
];

/// A buffer that begins on a page, filled with small numbers.
struct Buffer(Vec<f32>, usize);

impl Buffer {
    fn new(len: usize) -> Buffer {
        let values: Vec<f32> =
            (0..len + 1024).map(|i| ((i * 2_654_435_761) >> 7 & 63) as f32 / 64.0).collect();
        let skip = values.as_ptr().align_offset(4096);
        Buffer(values, skip)
    }
    fn slice(&mut self) -> &mut [f32] {
        &mut self.0[self.1..]
    }
}

/// Register-only multiply-adds: the peak.
struct Peak(usize);

impl Kernel for Peak {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.zero(); 12];
        let x = s.splat(0.999);
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = s.fma(x, *sum, x);
            }
        }
        sums.into_iter().fold(0.0, |total, sum| total + s.sum(sum))
    }
}

/// Seconds of processor time of this process: on a shared machine, what one thread takes alone.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists on every Linux and writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// The least time of some runs after a first one: processor time where one thread works, else time
/// on the wall.
fn best_of(repeats: usize, mut f: impl FnMut()) -> f64 {
    let alone = rayon::current_num_threads() == 1;
    (0..=repeats).fold(f64::INFINITY, |best, i| {
        let (start, processor) = (Instant::now(), processor_seconds());
        f();
        let seconds = if alone { processor_seconds() - processor } else { start.elapsed().as_secs_f64() };
        if i == 0 { best } else { best.min(seconds) }
    })
}

/// Seconds of forward with statistics, data gradient, weight gradient, packing for both.
fn measure(shape: &Shape, imgsz: usize, batch: usize, repeats: usize) -> ([f64; 4], u64) {
    let &Shape(c_in, c_out, kernel, stride, map, _, pitch) = shape;
    let p = Conv2dParams { c_in, c_out, kernel, stride, pad: kernel / 2 };
    let size = imgsz / map;
    let out = p.output_size(size, size).0;
    let xv = View::new(0, batch, size, size, pitch, 1).slice(0, c_in);
    let yv = View::new(0, batch, out, out, c_out, 1);
    let mut x = Buffer::new(View::storage_len(batch, size, size, pitch, 1));
    let mut y = Buffer::new(View::storage_len(batch, out, out, c_out, 1));
    let mut weight = Buffer::new(p.weight_len());
    let mut packed = Buffer::new(p.packed_forward_len());
    let mut packed_back = Buffer::new(p.packed_backward_len());
    let mut workspace = Buffer::new(p.backward_weight_workspace_len(batch, out, out));
    let mut partials = vec![0.0; cpu::stats_partials_len(&p, batch, out, out)];
    let weight_len = p.weight_len();
    let pack = best_of(repeats, || {
        cpu::pack_forward(&p, &weight.slice()[..weight_len], packed.slice());
        cpu::pack_backward(&p, &weight.slice()[..weight_len], packed_back.slice());
    });
    let forward = best_of(repeats, || {
        let epilogue = cpu::Epilogue::Stats { partials: &mut partials };
        cpu::forward(&p, Src::of(x.slice(), xv), packed.slice(), Dst::of(y.slice(), yv), epilogue);
    });
    let weights = best_of(repeats, || {
        let (x, y) = (Src::of(x.slice(), xv), Src::of(y.slice(), yv));
        cpu::backward_weight(&p, x, y, &mut weight.slice()[..weight_len], workspace.slice());
    });
    let data = match c_in {
        3 => 0.0, // the image needs no gradient
        _ => best_of(repeats, || {
            let (dy, dx) = (Src::of(y.slice(), yv), Dst::of(x.slice(), xv));
            cpu::backward_data(&p, dy, packed_back.slice(), dx, false);
        }),
    };
    ([forward, data, weights, pack], p.macs(batch, size, size))
}

fn main() {
    let (mut imgsz, mut batch, mut threads, mut repeats) = (320, 8, vec![1, 2], 3);
    let mut only = String::new();
    for argument in std::env::args().skip(1) {
        let number = |value: &str| value.parse::<usize>().expect("a number after =");
        match argument.split_once('=') {
            Some(("imgsz", value)) => imgsz = number(value),
            Some(("batch", value)) => batch = number(value),
            Some(("threads", value)) => threads = value.split(',').map(number).collect(),
            Some(("repeats", value)) => repeats = number(value),
            Some(("only", value)) => only = value.to_owned(),
            _ => {} // cargo passes --bench
        }
    }
    let level = simd::level();
    let rounds = 4_000_000;
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread pool");
    let run = || assert!(level.call(Peak(std::hint::black_box(rounds))).is_finite());
    let peak = 24.0 * (rounds * level.lanes()) as f64 / one.install(|| best_of(5, run)) / 1e9;
    println!("yolov8n at {imgsz}, batch {batch}; {}, peak of one core {peak:.0} GFLOP/s", level.name());
    for threads in threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        println!("\n{threads} thread(s): GFLOP/s (% of peak) and ms");
        println!("{:>24} {:>3} {:>22} {:>22} {:>22}", "shape", "n", "forward", "data", "weight");
        let (mut total, mut flops) = ([0.0; 4], 0.0);
        for shape in YOLOV8N {
            let &Shape(c_in, c_out, k, s, map, count, pitch) = shape;
            let name = format!("{c_in}-{c_out} k{k} s{s} @{}", imgsz / map);
            if !name.starts_with(&only) {
                continue;
            }
            let (seconds, macs) = pool.install(|| measure(shape, imgsz, batch, repeats));
            let slice = if pitch == c_in { "" } else { " slice" };
            print!("{:>24} {count:>3}", name + slice);
            for (total, seconds) in total.iter_mut().zip(seconds) {
                *total += seconds * 1e3 * count as f64;
            }
            for seconds in &seconds[..3] {
                let rate = 2e-9 * macs as f64 / seconds.max(1e-12);
                let share = 100.0 * rate / peak / threads as f64;
                match *seconds {
                    0.0 => print!(" {:>22}", "-"),
                    _ => print!(" {rate:>8.0} {share:>3.0}% {:>8.3}", seconds * 1e3),
                }
            }
            println!();
            flops += 2e-9 * (macs as usize * count) as f64;
        }
        let all: f64 = total.iter().sum();
        let [f, d, w, packing] = total;
        println!(
            "forward {f:.1} ms ({:.0} GFLOP/s), data {d:.1} ms, weight {w:.1} ms, packing {packing:.1} ms",
            flops / f * 1e3
        );
        println!("all passes {all:.1} ms, {:.0} GFLOP/s", 3e3 * flops / all);
    }
}
