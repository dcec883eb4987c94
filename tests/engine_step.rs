//! A whole training step of yolov8n: nothing is allocated while stepping, and the bits do not depend on the
//! number of threads, on what ran in the arena before, or on the batch being repeated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use boxwright::detect::models::Detector;
use boxwright::engine::device::cpu::Executor;
use boxwright::engine::params::{ParamKind, ParamSet};
use boxwright::engine::plan::{Mode, Plan};
use boxwright::engine::rng::{Rng, Use};

/// Counts allocations of every thread.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Setup {
    model: Detector,
    params: ParamSet,
    train: Plan,
    executor: Executor,
    gradients: Vec<Vec<f32>>,
}

impl Setup {
    fn new(size: usize, batch: usize, threads: usize, other: Option<&Plan>) -> Setup {
        let model = Detector::build("yolov8n", 7, size, size).expect("a shipped model");
        let train = Plan::new(&model.graph, batch, Mode::Train);
        let mut params = ParamSet::new(&model.graph);
        for i in 0..params.infos.len() {
            let mut rng = Rng::new(5, Use::Init, 0, i as u32);
            if let ParamKind::ConvWeight { kernel, c_in, .. } = params.infos[i].kind {
                let bound = 1.0 / ((kernel * kernel * c_in) as f64).sqrt();
                params.numbers_mut(i).iter_mut().for_each(|v| *v = rng.range(-bound, bound) as f32);
            }
        }
        let plans: Vec<&Plan> = std::iter::once(&train).chain(other).collect();
        let mut executor = Executor::new(&plans, threads).expect("a small plan");
        let mut rng = Rng::new(6, Use::Test, 0, 0);
        executor.input_mut(&train).iter_mut().for_each(|b| *b = rng.next_u32() as u8);
        let gradients = (0..train.output_count())
            .map(|i| {
                (0..train.output_shape(i).iter().product()).map(|_| rng.normal() as f32 * 1e-2).collect()
            })
            .collect();
        Setup { model, params, train, executor, gradients }
    }

    fn step(&mut self) {
        self.executor.forward(&self.model.graph, &self.train, &mut self.params);
        for (i, gradient) in self.gradients.iter().enumerate() {
            self.executor.output_grad_mut(&self.train, i).copy_from_slice(gradient);
        }
        self.executor.backward(&self.model.graph, &self.train, &mut self.params);
    }
}

// One test, because the counter sees every thread of the process.
#[test]
fn a_step_is_repeatable_and_allocates_nothing() {
    let reference = {
        let mut setup = Setup::new(96, 3, 1, None);
        setup.step();
        assert!(setup.params.grads.iter().all(|g| g.is_finite()));
        assert!(setup.params.grads.iter().any(|g| *g != 0.0));
        (setup.params.grads.clone(), setup.params.buffers.clone())
    };
    for threads in [2, 3] {
        let mut setup = Setup::new(96, 3, threads, None);
        setup.step();
        assert!(
            setup.params.grads == reference.0 && setup.params.buffers == reference.1,
            "{threads} threads"
        );
    }
    // An evaluation at another size leaves its numbers, borders included, all over the arena.
    let other = Detector::build("yolov8n", 7, 160, 128).expect("a shipped model");
    let eval = Plan::new(&other.graph, 5, Mode::Eval);
    let mut setup = Setup::new(96, 3, 2, Some(&eval));
    let input = setup.executor.input_mut(&setup.train).to_vec();
    setup.executor.input_mut(&eval).fill(200);
    let mut params = setup.params.clone();
    setup.executor.forward(&other.graph, &eval, &mut params);
    setup.executor.input_mut(&setup.train).copy_from_slice(&input);
    setup.step();
    assert!(setup.params.grads == reference.0, "what ran before must not show");

    let (mut setup, steps) = (Setup::new(64, 2, 2, None), 20);
    setup.step();
    setup.step();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (0..steps).for_each(|_| setup.step());
    let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
    // The queue between threads takes a block now and then (one for 63 hand-overs); a step makes none itself.
    assert!(made <= steps, "{made} allocations in {steps} steps");
}
