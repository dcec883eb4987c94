use boxwright::{
    detect::decode::HeadLevel,
    detect::losses::detection::*,
    detect::models::Detector,
    detect::targets::Target,
    engine::{
        device::cpu::Executor,
        params::{ParamKind, ParamSet},
        plan::*,
        rng::*,
    },
};
use std::time::Instant;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let s: usize = a[1].parse().unwrap();
    let b: usize = a[2].parse().unwrap();
    let th: usize = a[3].parse().unwrap();
    let steps: usize = a[4].parse().unwrap();
    let m = Detector::build(a.get(5).map(|s| s.as_str()).unwrap_or("yolov8n"), 80, s, s).unwrap();
    let p = Plan::new(&m.graph, b, Mode::Train);
    let mut ps = ParamSet::new(&m.graph);
    let mut r = Rng::new(0, Use::Init, 0, 0);
    for i in 0..ps.infos.len() {
        if let ParamKind::ConvWeight { kernel, c_in, .. } = ps.infos[i].kind {
            let bd = 1.0 / ((kernel * kernel * c_in) as f64).sqrt();
            for v in ps.numbers_mut(i) {
                *v = r.range(-bd, bd) as f32;
            }
        }
    }
    let mut ex = Executor::new(&[&p], th).unwrap();
    for v in ex.input_mut(&p) {
        *v = r.next_u32() as u8;
    }
    let mut loss = DetectionLoss::new(LossConfig::new(80), b, m.anchor_count(), 64);
    let mut t = vec![];
    for i in 0..b {
        for _ in 0..12 {
            t.push(Target {
                image: i as u32,
                class: r.below(80) as u32,
                cxcywh: [
                    r.range(0.2, 0.8) as f32,
                    r.range(0.2, 0.8) as f32,
                    r.range(0.05, 0.3) as f32,
                    r.range(0.05, 0.3) as f32,
                ],
            });
        }
    }
    let mut times = vec![];
    let mut lt = 0.0;
    for k in 0..steps + 2 {
        if k == 2 {
            ex.take_profile();
            lt = 0.0;
        }
        let t0 = Instant::now();
        ex.forward(&m.graph, &p, &mut ps);
        let l0 = Instant::now();
        let pool = ex.pool();
        {
            let mut levels = vec![];
            let mut grads = vec![];
            let mut o = ex.outputs_and_grads(&p).into_iter();
            for (l, &stride) in m.strides.iter().enumerate() {
                let [_, h, w, _] = p.output_shape(2 * l);
                let (bx, bg) = o.next().unwrap();
                let (sc, sg) = o.next().unwrap();
                levels.push(HeadLevel { stride, h, w, boxes: bx, scores: sc });
                grads.push(HeadLevelGrad { boxes: bg, scores: sg });
            }
            pool.install(|| loss.compute(&levels, &mut grads, &t, b, 1.0));
        }
        lt += l0.elapsed().as_secs_f64();
        ex.backward(&m.graph, &p, &mut ps);
        ps.clear_grads();
        times.push(t0.elapsed().as_secs_f64());
    }
    let mut w = times[2..].to_vec();
    w.sort_by(f64::total_cmp);
    let med = w[w.len() / 2];
    println!(
        "{s} b{b} t{th}: {:.1} ms, {:.1} img/s, {:.0} GFLOP/s; loss {:.1} ms",
        med * 1e3,
        b as f64 / med,
        6.0 * m.graph.macs() as f64 * b as f64 / med / 1e9,
        lt * 1e3 / steps as f64
    );
    for (k, d, c) in ex.take_profile().rows {
        println!("  {k:<26} {:.2} ms {c}", d.as_secs_f64() * 1e3 / steps as f64);
    }
}
