//! Loss pieces: overlaps, DFL, class losses, embeddings, anchors, assignment, the set criterion.

use boxwright::detect::anchors::{clamped_logit, rtdetr_anchors};
use boxwright::detect::assigners::hungarian;
use boxwright::detect::boxes::{
    IouKind, box_iou, iou_cxcywh, iou_cxcywh_gradient, iou_xyxy, iou_xyxy_gradient,
};
use boxwright::detect::embedding::sine_cosine_2d;
use boxwright::detect::losses::bce::bce_with_logits;
use boxwright::detect::losses::cross_entropy::cross_entropy;
use boxwright::detect::losses::detr::{DetrConfig, DetrTargets, criterion, match_queries};
use boxwright::detect::losses::dfl::{dfl_loss, distances};
use boxwright::detect::losses::focal::focal;
use boxwright::detect::losses::varifocal::varifocal;

use crate::common::tolerances::{ASSIGNMENT_TOTAL, IOU_DEGENERATE, PIECE, Tolerance};
use crate::common::{Golden, assert_close, assert_exact, assert_scalar_close};

fn boxes(golden: &Golden, name: &str) -> Vec<[f32; 4]> {
    golden.f32(name).as_chunks::<4>().0.to_vec()
}

#[test]
fn golden_loss_pieces_are_all_covered() {
    let known =
        ["iou/", "dfl/", "cls/", "ce/", "sincos/", "anchors/", "invsig/", "lsa/", "match/", "criterion/"];
    for name in Golden::open("loss_pieces").names() {
        assert!(known.iter().any(|prefix| name.starts_with(prefix)), "no test reads {name}");
    }
}

/// Boxes with a tiny side divide by almost nothing.
fn iou_tolerance(form: &str, a: [f32; 4], b: [f32; 4]) -> Tolerance {
    let sides = |v: [f32; 4]| if form == "xyxy" { (v[2] - v[0]).min(v[3] - v[1]) } else { v[2].min(v[3]) };
    if sides(a).min(sides(b)) < 1e-3 { IOU_DEGENERATE } else { PIECE }
}

#[test]
fn golden_iou_family_and_gradients() {
    let golden = Golden::open("loss_pieces");
    for form in ["xyxy", "xywh"] {
        let (a, b) =
            (boxes(&golden, &format!("iou/{form}/box1")), boxes(&golden, &format!("iou/{form}/box2")));
        for (text, kind) in
            [("IoU", IouKind::Iou), ("GIoU", IouKind::Giou), ("DIoU", IouKind::Diou), ("CIoU", IouKind::Ciou)]
        {
            let name = format!("iou/{form}/{text}");
            let (values, gradients) = (golden.f32(&name), boxes(&golden, &format!("{name}_dbox1")));
            assert_eq!(values.len(), a.len());
            for i in 0..a.len() {
                let (value, (same, gradient)) = if form == "xyxy" {
                    (iou_xyxy(kind, a[i], b[i]), iou_xyxy_gradient(kind, a[i], b[i]))
                } else {
                    (iou_cxcywh(kind, a[i], b[i]), iou_cxcywh_gradient(kind, a[i], b[i]))
                };
                assert_eq!(value, same, "{name} row {i}: value with and without gradient");
                let tolerance = iou_tolerance(form, a[i], b[i]);
                assert_close(&format!("{name} row {i}"), &[value], &values[i..=i], tolerance);
                assert_close(&format!("{name}_dbox1 row {i}"), &gradient, &gradients[i], tolerance);
            }
        }
    }
    let (a, b) = (boxes(&golden, "iou/xyxy/box1"), boxes(&golden, "iou/xyxy/box2"));
    let shape = golden.shape("iou/pairwise_box_iou");
    let got: Vec<f32> =
        a[..shape[0]].iter().flat_map(|x| b[..shape[1]].iter().map(move |y| box_iou(*x, *y))).collect();
    assert_close("iou/pairwise_box_iou", &got, &golden.f32("iou/pairwise_box_iou"), PIECE);
}

#[test]
fn golden_distribution_focal_loss() {
    let golden = Golden::open("loss_pieces");
    let shape = golden.shape("dfl/pred_dist");
    let (n, bins) = (shape[0] / 4, shape[1]);
    let logits = golden.f32("dfl/pred_dist");
    let targets = boxes(&golden, "dfl/target");
    let mut gradient = vec![0.0f32; logits.len()];
    let (mut losses, mut expectation) = (Vec::new(), vec![0.0f32; 4 * n]);
    for i in 0..n {
        let row = i * 4 * bins..(i + 1) * 4 * bins;
        losses.push(dfl_loss(&logits[row.clone()], targets[i], bins, &mut gradient[row.clone()], 1.0));
        for (side, d) in distances(&logits[row], bins).into_iter().enumerate() {
            expectation[side * n + i] = d;
        }
    }
    assert_close("dfl/loss", &losses, &golden.f32("dfl/loss"), PIECE);
    assert_close("dfl/dpred", &gradient, &golden.f32("dfl/dpred"), PIECE);
    assert_eq!(golden.shape("dfl/expectation"), [1, 4, n]);
    assert_close("dfl/expectation", &expectation, &golden.f32("dfl/expectation"), PIECE);
}

#[test]
fn golden_class_losses() {
    let golden = Golden::open("loss_pieces");
    let (logits, onehot, quality) =
        (golden.f32("cls/logits"), golden.f32("cls/onehot"), golden.f32("cls/quality"));
    // The scalars average over the second axis and add up the rest.
    let rows = golden.shape("cls/logits")[1] as f32;
    let bce: Vec<(f32, f32)> = logits.iter().zip(&quality).map(|(x, q)| bce_with_logits(*x, *q)).collect();
    let values: Vec<f32> = bce.iter().map(|v| v.0).collect();
    let gradients: Vec<f32> = bce.iter().map(|v| v.1).collect();
    assert_close("cls/bce_none", &values, &golden.f32("cls/bce_none"), PIECE);
    assert_close("cls/bce_dlogits", &gradients, &golden.f32("cls/bce_dlogits"), PIECE);
    let mut seen = 0;
    for name in golden.with_prefix("cls/") {
        let Some((kind, rest)) = name["cls/".len()..].split_once("_g") else { continue };
        if name.ends_with("_dlogits") {
            continue;
        }
        let (gamma, alpha) = rest.split_once("_a").expect("gamma and alpha in the name");
        let (gamma, alpha): (f32, f32) = (gamma.parse().expect("gamma"), alpha.parse().expect("alpha"));
        let results: Vec<(f32, f32)> = (0..logits.len())
            .map(|i| match kind {
                "vfl" => varifocal(logits[i], quality[i], onehot[i] > 0.0, alpha, gamma),
                "focal" => focal(logits[i], onehot[i], alpha, gamma),
                other => panic!("unknown class loss {other}"),
            })
            .collect();
        let total = results.iter().map(|v| v.0 as f64).sum::<f64>() / rows as f64;
        assert_scalar_close(&name, total, golden.scalar(&name), PIECE);
        let gradients: Vec<f32> = results.iter().map(|v| v.1 / rows).collect();
        assert_close(&format!("{name}_dlogits"), &gradients, &golden.f32(&format!("{name}_dlogits")), PIECE);
        seen += 1;
    }
    assert!(seen >= 2);
}

#[test]
fn golden_cross_entropy() {
    let golden = Golden::open("loss_pieces");
    let logits = golden.f32("ce/logits");
    let classes: Vec<usize> = golden.i64("ce/target").into_iter().map(|c| c as usize).collect();
    let mut gradient = vec![0.0; logits.len()];
    let loss = cross_entropy(&logits, &classes, golden.shape("ce/logits")[1], &mut gradient);
    assert_scalar_close("ce/loss", loss as f64, golden.scalar("ce/loss"), PIECE);
    assert_close("ce/dlogits", &gradient, &golden.f32("ce/dlogits"), PIECE);
}

#[test]
fn golden_position_embedding_anchors_and_logit() {
    let golden = Golden::open("loss_pieces");
    let embeddings = golden.with_prefix("sincos/");
    assert!(!embeddings.is_empty());
    for name in embeddings {
        // sincos/w<columns>h<rows>d<channels>
        let numbers: Vec<usize> = name["sincos/".len()..]
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect();
        let (w, h, channels) = (numbers[0], numbers[1], numbers[2]);
        assert_close(&name, &sine_cosine_2d(h, w, channels), &golden.f32(&name), PIECE);
    }
    let shapes: Vec<(usize, usize)> =
        golden.i64("anchors/shapes").chunks_exact(2).map(|hw| (hw[0] as usize, hw[1] as usize)).collect();
    let (logits, valid) = rtdetr_anchors(&shapes);
    let valid: Vec<u8> = valid.into_iter().map(u8::from).collect();
    assert_exact("anchors/valid", &valid, &golden.u8("anchors/valid"));
    let step = golden.with_prefix("anchors/every_")[0].clone();
    let every: usize =
        step.trim_start_matches("anchors/every_").trim_end_matches("th").parse().expect("a step");
    let got: Vec<f32> =
        logits.iter().step_by(every).flatten().map(|v| if v.is_infinite() { 1e30 } else { *v }).collect();
    assert_close(&step, &got, &golden.f32(&step), PIECE);
    let got: Vec<f32> = golden.f32("invsig/x").into_iter().map(clamped_logit).collect();
    assert_close("invsig/y", &got, &golden.f32("invsig/y"), PIECE);
}

#[test]
fn golden_linear_assignment() {
    let golden = Golden::open("loss_pieces");
    let cases: Vec<String> =
        golden.names().into_iter().filter(|n| n.starts_with("lsa/") && n.ends_with("/cost")).collect();
    assert!(!cases.is_empty());
    for name in cases {
        let case = name.trim_end_matches("/cost");
        let shape = golden.shape(&name);
        let cost = golden.f32(&name);
        let pairs = hungarian::assign(&cost, shape[0], shape[1]);
        let total: f64 = pairs.iter().map(|&(r, c)| cost[r * shape[1] + c] as f64).sum();
        assert_scalar_close(
            &format!("{case}/total"),
            total,
            golden.scalar(&format!("{case}/total")),
            ASSIGNMENT_TOTAL,
        );
        let rows: Vec<i64> = pairs.iter().map(|p| p.0 as i64).collect();
        let columns: Vec<i64> = pairs.iter().map(|p| p.1 as i64).collect();
        assert_exact(&format!("{case}/rows"), &rows, &golden.i64(&format!("{case}/rows")));
        assert_exact(&format!("{case}/cols"), &columns, &golden.i64(&format!("{case}/cols")));
    }
}

#[test]
fn golden_set_matching_and_criterion() {
    let golden = Golden::open("loss_pieces");
    let shape = golden.shape("match/pred_logits");
    let (images, queries, nc) = (shape[0], shape[1], shape[2]);
    let (predicted, logits) = (boxes(&golden, "match/pred_bboxes"), golden.f32("match/pred_logits"));
    let usizes = |name: &str| golden.i64(name).into_iter().map(|v| v as usize).collect::<Vec<_>>();
    let (wanted, classes, groups) =
        (boxes(&golden, "match/gt_bboxes"), usizes("match/gt_cls"), usizes("match/groups"));
    let targets = DetrTargets { cxcywh: &wanted, classes: &classes, groups: &groups };
    let config = DetrConfig::new(nc);
    let mut got: Vec<[i64; 3]> = match_queries(&config, &predicted, &logits, queries, &targets)
        .iter()
        .map(|m| [m.image as i64, m.query as i64, m.target as i64])
        .collect();
    got.sort_unstable();
    let mut expected: Vec<[i64; 3]> = golden.i64("match/out").as_chunks::<3>().0.to_vec();
    // The reference counts targets over the batch or inside the image; the file says which by its largest index.
    let in_batch = expected.iter().map(|row| row[2]).max().unwrap_or(-1) + 1 == wanted.len() as i64;
    if !in_batch {
        let starts: Vec<i64> = groups
            .iter()
            .scan(0, |sum, g| {
                let s = *sum;
                *sum += *g as i64;
                Some(s)
            })
            .collect();
        expected.iter_mut().for_each(|row| row[2] += starts[row[0] as usize]);
    }
    expected.sort_unstable();
    assert_exact("match/out", &got, &expected);

    // Two layers: shifted boxes with halved logits, then the tensors themselves.
    let layers = golden.shape("criterion/dbboxes")[0];
    assert_eq!(layers, 2);
    let all_boxes: Vec<[f32; 4]> =
        predicted.iter().map(|b| b.map(|v| v + 0.02)).chain(predicted.iter().copied()).collect();
    let all_logits: Vec<f32> = logits.iter().map(|v| v * 0.5).chain(logits.iter().copied()).collect();
    let names: Vec<String> = golden
        .meta("criterion_component_names")
        .as_array()
        .expect("names")
        .iter()
        .map(|n| n.as_str().expect("a name").to_string())
        .collect();
    let (mut d_boxes, mut d_logits) = (vec![[0.0; 4]; all_boxes.len()], vec![0.0; all_logits.len()]);
    let mut run = |targets: &DetrTargets| {
        let loss = criterion(
            &config,
            layers,
            &all_boxes,
            &all_logits,
            queries,
            targets,
            None,
            &mut d_boxes,
            &mut d_logits,
        );
        let components: Vec<f32> = names
            .iter()
            .map(|name| match name.as_str() {
                "loss_bbox" => loss.main.bbox,
                "loss_bbox_aux" => loss.auxiliary.bbox,
                "loss_class" => loss.main.class,
                "loss_class_aux" => loss.auxiliary.class,
                "loss_giou" => loss.main.giou,
                "loss_giou_aux" => loss.auxiliary.giou,
                other => panic!("unknown component {other}"),
            })
            .collect();
        (components, loss.total())
    };
    let empty = DetrTargets { cxcywh: &[], classes: &[], groups: &vec![0; images] };
    let (components, _) = run(&empty);
    assert_close("criterion/empty_components", &components, &golden.f32("criterion/empty_components"), PIECE);
    let (components, total) = run(&targets);
    assert_close("criterion/components", &components, &golden.f32("criterion/components"), PIECE);
    assert_scalar_close("criterion/total", total as f64, golden.scalar("criterion/total"), PIECE);
    assert_close("criterion/dbboxes", &d_boxes.concat(), &golden.f32("criterion/dbboxes"), PIECE);
    assert_close("criterion/dlogits", &d_logits, &golden.f32("criterion/dlogits"), PIECE);
}
