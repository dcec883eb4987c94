//! Geometry and colour of the image pipeline against the golden vectors.

mod common;

use boxwright::data::augment::canvas::{Canvas, WarpScratch};
use boxwright::data::augment::letterbox::{Fit, Letterbox, unletterbox};
use boxwright::data::augment::perspective::{PerspectiveDraws, keeps, transform_box, transform_boxes};
use boxwright::data::augment::{PixelBox, hsv, mosaic};
use boxwright::data::resize::loaded_size;
use boxwright::data::{Image, rect};
use common::compare::assert_close_f64;
use common::tolerances::{GEOMETRY_BOXES_PX, GEOMETRY_MATRIX, IMAGE_LEVELS};
use common::{Golden, assert_close, assert_exact};
use serde_json::Value;

fn cases<'a>(golden: &'a Golden, key: &str) -> &'a [Value] {
    golden.meta("meta")[key].as_array().expect("a list of cases")
}

fn usizes(value: &Value) -> Vec<usize> {
    value.as_array().expect("a list").iter().map(|v| v.as_u64().expect("a whole number") as usize).collect()
}

fn image(golden: &Golden, name: &str) -> Image {
    let shape = golden.shape(name);
    Image::from_pixels(shape[0], shape[1], golden.u8(name))
}

/// Rows of four numbers.
fn boxes(golden: &Golden, name: &str) -> Vec<[f32; 4]> {
    golden.f32(name).as_chunks::<4>().0.to_vec()
}

fn pixel_boxes(golden: &Golden, boxes_name: &str, classes_name: &str) -> Vec<PixelBox> {
    let classes = golden.f32(classes_name);
    boxes(golden, boxes_name)
        .into_iter()
        .zip(classes)
        .map(|(xyxy, c)| PixelBox { class: c as u32, xyxy })
        .collect()
}

fn flat(boxes: &[PixelBox]) -> Vec<f32> {
    boxes.iter().flat_map(|b| b.xyxy).collect()
}

#[track_caller]
fn assert_levels(name: &str, actual: &[u8], expected: &[u8]) {
    assert_eq!(actual.len(), expected.len(), "{name}: number of bytes");
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        assert!(a.abs_diff(e) <= IMAGE_LEVELS, "{name}[{i}]: got {a}, expected {e}");
    }
}

fn letterbox_of(case: &Value) -> Letterbox {
    let (hw, shape) = (usizes(&case["hw"]), usizes(&case["new_shape"]));
    let flag = |key: &str, default: bool| case.get(key).map_or(default, |v| v.as_bool().expect("a boolean"));
    let fit = if flag("scale_fill", false) {
        Fit::Stretch
    } else if flag("auto", false) {
        Fit::PadToStride(32)
    } else {
        Fit::Pad
    };
    Letterbox::new((hw[0], hw[1]), (shape[0], shape[1]), fit, flag("scaleup", true))
}

#[test]
fn golden_letterbox_shapes_and_boxes() {
    let golden = Golden::open("geometry");
    for (i, case) in cases(&golden, "letterbox").iter().enumerate() {
        let made = letterbox_of(case);
        let ratio: Vec<f64> =
            case["ratio_wh"].as_array().expect("pair").iter().filter_map(Value::as_f64).collect();
        assert_close_f64("ratio", &[made.ratio.0, made.ratio.1], &ratio, GEOMETRY_MATRIX);
        assert_eq!(vec![made.scaled_hw.1, made.scaled_hw.0], usizes(&case["new_unpad_wh"]), "case {i}");
        let side = |key: &str| case[key].as_u64().expect("a whole number") as usize;
        assert_eq!((made.top, made.left), (side("top"), side("left")), "case {i}");
        assert_eq!(vec![made.out_hw.0, made.out_hw.1], usizes(&case["out_hw"]), "case {i}");
        assert_eq!(made.out_hw.0 - made.scaled_hw.0 - made.top, side("bottom"), "case {i}");
        assert_eq!(made.out_hw.1 - made.scaled_hw.1 - made.left, side("right"), "case {i}");

        let inputs = boxes(&golden, &format!("letterbox/{i}/in_boxes_xywhn"));
        let placed: Vec<PixelBox> = inputs.iter().map(|b| made.place_box(0, *b)).collect();
        let expected = golden.f32(&format!("letterbox/{i}/out_boxes_xyxy"));
        assert_close(&format!("letterbox/{i}"), &flat(&placed), &expected, GEOMETRY_BOXES_PX);
        let back: Vec<f32> = boxes(&golden, &format!("letterbox/{i}/out_boxes_xyxy"))
            .into_iter()
            .flat_map(|b| unletterbox(b, made.out_hw, made.in_hw))
            .collect();
        let name = format!("letterbox/{i}/scale_boxes_back");
        assert_close(&name, &back, &golden.f32(&name), GEOMETRY_BOXES_PX);
    }
}

#[test]
fn golden_letterbox_images() {
    let golden = Golden::open("geometry");
    let mut compared = 0;
    for (i, case) in cases(&golden, "letterbox").iter().enumerate() {
        let name = format!("letterbox/{i}/img_in");
        if !golden.has(&name) {
            continue;
        }
        let made = letterbox_of(case);
        let mut out = vec![0; made.out_hw.0 * made.out_hw.1 * 3];
        made.draw(&image(&golden, &name), &mut out);
        assert_levels(&name, &out, &golden.u8(&format!("letterbox/{i}/img_out")));
        compared += 1;
    }
    assert!(compared > 0, "the file holds letterboxed images");
}

#[test]
fn golden_loader_resize() {
    let golden = Golden::open("geometry");
    for case in cases(&golden, "loader_resize") {
        let (from, to) = (usizes(&case["hw0"]), usizes(&case["hw"]));
        let imgsz = case["imgsz"].as_u64().expect("a size") as usize;
        assert_eq!(loaded_size(from[0], from[1], imgsz), (to[0], to[1]), "{case}");
    }
}

#[test]
fn golden_perspective() {
    let golden = Golden::open("geometry");
    for (i, case) in cases(&golden, "perspective").iter().enumerate() {
        let at = |name: &str| format!("perspective/{i}/{name}");
        let d = golden.f64(&at("draws"));
        let draws = PerspectiveDraws {
            perspective_x: d[0],
            perspective_y: d[1],
            angle: d[2],
            scale: d[3],
            shear_x: d[4],
            shear_y: d[5],
            translate_x: d[6],
            translate_y: d[7],
        };
        let input = image(&golden, &at("img_in"));
        let size = usizes(&case["size_wh"]);
        let out_hw = (size[1], size[0]);
        let matrix = draws.matrix((input.height, input.width), out_hw);
        assert_close_f64(&at("M"), matrix.as_flattened(), &golden.f64(&at("M")), GEOMETRY_MATRIX);

        let mut out = vec![0; out_hw.0 * out_hw.1 * 3];
        Canvas::single(&input).warp(&matrix, out_hw, &mut out, &mut WarpScratch::default());
        assert_levels(&at("img_out"), &out, &golden.u8(&at("img_out")));

        let mut labels = pixel_boxes(&golden, &at("boxes_in"), &at("cls_in"));
        let moved: Vec<PixelBox> = labels.iter().map(|b| transform_box(&matrix, b, out_hw)).collect();
        let all = at("boxes_all_clipped");
        assert_close(&all, &flat(&moved), &golden.f32(&all), GEOMETRY_BOXES_PX);
        let keep: Vec<u8> =
            labels.iter().zip(&moved).map(|(a, b)| u8::from(keeps(a, b, draws.scale))).collect();
        assert_exact(&at("keep"), &keep, &golden.u8(&at("keep")));
        transform_boxes(&matrix, draws.scale, out_hw, &mut labels);
        assert_close(&at("boxes_out"), &flat(&labels), &golden.f32(&at("boxes_out")), GEOMETRY_BOXES_PX);
        let classes: Vec<f32> = labels.iter().map(|b| b.class as f32).collect();
        assert_exact(&at("cls_out"), &classes, &golden.f32(&at("cls_out")));
    }
}

#[test]
fn golden_mosaic() {
    let golden = Golden::open("geometry");
    for (i, case) in cases(&golden, "mosaic").iter().enumerate() {
        let number = |key: &str| case[key].as_u64().expect("a whole number") as usize;
        let (imgsz, centre) = (number("imgsz"), (number("xc"), number("yc")));
        let rects = case["rects"].as_array().expect("rectangles");
        let images: Vec<Image> =
            (0..rects.len()).map(|j| image(&golden, &format!("mosaic/{i}/img{j}"))).collect();
        let (mut patches, mut labels) = (Vec::new(), Vec::new());
        for (j, source) in images.iter().enumerate() {
            let rect = mosaic::place(j, centre, source.height, source.width, imgsz);
            let expected = usizes(&rects[j]);
            assert_eq!(rect.dest.as_slice(), &expected[..4], "mosaic/{i} patch {j}");
            assert_eq!(rect.source.as_slice(), &expected[4..6], "mosaic/{i} patch {j}");
            let own =
                pixel_boxes(&golden, &format!("mosaic/{i}/boxes{j}_xyxy_px"), &format!("mosaic/{i}/cls{j}"));
            mosaic::append_boxes(&rect, imgsz, &own, &mut labels);
            patches.push((rect, source));
        }
        let out = Canvas::new(2 * imgsz, 2 * imgsz, patches).materialise();
        assert_exact(&format!("mosaic/{i}/out_img"), &out.pixels, &golden.u8(&format!("mosaic/{i}/out_img")));
        let name = format!("mosaic/{i}/out_boxes");
        assert_close(&name, &flat(&labels), &golden.f32(&name), GEOMETRY_BOXES_PX);
        let classes: Vec<f32> = labels.iter().map(|b| b.class as f32).collect();
        assert_exact(&format!("mosaic/{i}/out_cls"), &classes, &golden.f32(&format!("mosaic/{i}/out_cls")));
    }
}

#[test]
fn golden_hsv() {
    let golden = Golden::open("geometry");
    let swapped = |mut bytes: Vec<u8>| {
        boxwright::data::augment::flip::swap_channels(&mut bytes);
        bytes
    };
    let input = swapped(golden.u8("hsv/img_bgr"));
    for (i, case) in cases(&golden, "hsv").iter().enumerate() {
        let gains: Vec<f64> =
            case["gains"].as_array().expect("gains").iter().filter_map(Value::as_f64).collect();
        let mut pixels = input.clone();
        hsv::jitter(&mut pixels, [gains[0], gains[1], gains[2]]);
        assert_levels(&format!("hsv/{i}"), &pixels, &swapped(golden.u8(&format!("hsv/{i}/out"))));
    }
}

#[test]
fn golden_rect_batches() {
    let golden = Golden::open("geometry");
    let case = &golden.meta("meta")["rect"];
    let number = |key: &str| case[key].as_u64().expect("a whole number") as usize;
    let sizes: Vec<(u32, u32)> =
        golden.i64("rect/shapes_hw").as_chunks::<2>().0.iter().map(|s| (s[0] as u32, s[1] as u32)).collect();
    let pad = case["pad"].as_f64().expect("a number");
    let plan = rect::plan(&sizes, number("batch"), number("imgsz"), number("stride"), pad);
    let order: Vec<i64> = plan.order.iter().map(|&i| i64::from(i)).collect();
    assert_exact("rect/order", &order, &golden.i64("rect/order"));
    let shapes: Vec<i64> = plan.shapes.iter().flat_map(|&(h, w)| [h as i64, w as i64]).collect();
    assert_exact("rect/batch_shapes", &shapes, &golden.i64("rect/batch_shapes"));
}
