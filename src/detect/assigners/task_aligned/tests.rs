use proptest::prelude::*;

use super::*;

/// The definition, anchor by anchor and target by target.
fn brute_force(
    config: &AssignerConfig,
    levels: &[GridLevel],
    boxes: &[[f32; 4]],
    probability: &dyn Fn(usize, usize) -> f32,
    targets: &[AssignTarget],
) -> Vec<(u32, u32, f32)> {
    let assigner = TaskAlignedAssigner::new(*config, levels.to_vec());
    let (a, m) = (anchor_count(levels), targets.len());
    let side_min = levels.get(1).unwrap_or(&levels[0]).stride as f32;
    let (mut u, mut metric) = (vec![vec![0.0f32; a]; m], vec![vec![0.0f32; a]; m]);
    for j in 0..m {
        let bounds = enlarge(&targets[j], side_min);
        for i in 0..a {
            let (px, py) = assigner.point(i);
            if targets[j].is_valid() && is_inside(px, py, bounds) {
                u[j][i] = iou_xyxy(IouKind::Ciou, targets[j].xyxy, boxes[i]).max(0.0);
                metric[j][i] = assigner.metric(probability(i, targets[j].class as usize), u[j][i]);
            }
        }
    }
    let top = |values: &[f32], k: usize| -> Vec<bool> {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&x, &y| values[y].total_cmp(&values[x]).then(x.cmp(&y)));
        let mut chosen = vec![false; values.len()];
        order.iter().take(k).filter(|&&i| values[i] > 0.0).for_each(|&i| chosen[i] = true);
        chosen
    };
    let mut positive: Vec<Vec<bool>> = metric.iter().map(|row| top(row, config.topk)).collect();
    for i in 0..a {
        if (0..m).filter(|&j| positive[j][i]).count() > 1 {
            let winner = (0..m).fold(0, |best, j| if u[j][i] > u[best][i] { j } else { best });
            (0..m).for_each(|j| positive[j][i] = j == winner);
        }
    }
    let masked = |values: &[f32], mask: &[bool]| -> Vec<f32> {
        values.iter().zip(mask).map(|(v, m)| if *m { *v } else { 0.0 }).collect()
    };
    if config.topk2 != config.topk {
        for j in 0..m {
            positive[j] = top(&masked(&metric[j], &positive[j]), config.topk2);
        }
    }
    let mut out = Vec::new();
    for i in 0..a {
        for j in 0..m {
            if positive[j][i] {
                let largest = |v: &[f32]| masked(v, &positive[j]).into_iter().fold(0.0f32, f32::max);
                let score = metric[j][i] * largest(&u[j]) / (largest(&metric[j]) + SCORE_EPS);
                out.push((i as u32, j as u32, score));
            }
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn grid_walk_equals_the_definition(
        seeds in proptest::collection::vec((0.0f32..96.0, 0.0f32..64.0, 0.0f32..50.0, 0.0f32..50.0, 0u32..3), 0..7),
        noise in proptest::collection::vec(-1.0f32..1.0, 64),
        one_to_one in any::<bool>(),
    ) {
        let levels = [8, 16, 32].map(|stride| GridLevel { stride, h: 64 / stride, w: 96 / stride });
        let mut targets: Vec<AssignTarget> = seeds
            .iter()
            // Coarse coordinates put many points exactly onto edges.
            .map(|s| (s.0.round(), s.1.round(), s.2.round(), s.3.round(), s.4))
            .map(|(x, y, w, h, class)| AssignTarget { xyxy: [x, y, x + w, y + h], class })
            .collect();
        if targets.len() > 3 {
            targets[1] = AssignTarget { xyxy: [0.0; 4], class: 0 };
        }
        let mut boxes = Vec::new();
        for_each_box(&levels, &noise, &mut boxes);
        let probability = |a: usize, c: usize| 0.5 + 0.49 * noise[(a * 3 + c) % noise.len()];
        let config = if one_to_one {
            AssignerConfig { topk: 7, topk2: 1, ..Default::default() }
        } else {
            AssignerConfig::default()
        };
        let assigner = TaskAlignedAssigner::new(config, levels.to_vec());
        let mut workspace = ImageWorkspace::new(boxes.len(), targets.len(), config.topk);
        workspace.targets_mut().extend_from_slice(&targets);
        // Twice: the second run must not see anything of the first.
        for _ in 0..2 {
            assigner.assign_image(&ImagePredictions { xyxy: &boxes, probability }, &mut workspace);
            let got: Vec<_> = workspace.positives().iter().map(|p| (p.anchor, p.target, p.score)).collect();
            prop_assert_eq!(&got, &brute_force(&config, &levels, &boxes, &probability, &targets));
        }
    }
}

fn for_each_box(levels: &[GridLevel], noise: &[f32], boxes: &mut Vec<[f32; 4]>) {
    crate::detect::anchors::for_each_anchor(levels, |a, level, x, y| {
        let n = |k: usize| noise[(a * 5 + k) % noise.len()];
        let half = level.stride as f32 * 1.5;
        let (cx, cy) = (centre(x, level.stride), centre(y, level.stride));
        boxes.push([
            cx - half * (1.0 + n(0)),
            cy - half * (1.0 + n(1)),
            cx + half * (1.0 + n(2)),
            cy + half * (1.0 + n(3)),
        ]);
    });
}
