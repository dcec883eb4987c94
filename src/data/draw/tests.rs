use image::{Rgb, RgbImage};
use proptest::prelude::*;

use super::*;

fn names() -> Vec<String> {
    ["circle", "a class with a rather long name"].map(String::from).to_vec()
}

fn drawn(boxes: &[DrawBox], w: u32, h: u32) -> RgbImage {
    let mut image = RgbImage::from_pixel(w, h, Rgb([90, 90, 90]));
    draw_boxes(&mut image, boxes, &names(), &BoxStyle::for_size(w, h));
    image
}

#[test]
fn a_box_is_drawn_in_the_colour_of_its_class_on_its_edge_only() {
    let image = drawn(&[DrawBox { xyxy: [40.0, 60.0, 160.0, 150.0], class: 1, score: None }], 200, 200);
    assert_eq!(image.get_pixel(100, 150).0, class_colour(1));
    assert_eq!(image.get_pixel(160, 100).0, class_colour(1));
    assert_eq!(image.get_pixel(100, 110).0, [90, 90, 90]);
    assert_eq!(image.get_pixel(190, 190).0, [90, 90, 90]);
}

#[test]
fn the_most_confident_box_is_on_top_whatever_the_order() {
    let weak = DrawBox { xyxy: [20.0, 60.0, 90.0, 90.0], class: 0, score: Some(0.3) };
    let sure = DrawBox { xyxy: [20.0, 60.0, 90.0, 90.0], class: 1, score: Some(0.9) };
    assert_eq!(drawn(&[weak, sure], 200, 200), drawn(&[sure, weak], 200, 200));
    assert_eq!(drawn(&[weak, sure], 200, 200).get_pixel(50, 90).0, class_colour(1));
}

#[test]
fn boxes_that_are_not_finite_are_left_out() {
    let bad = DrawBox { xyxy: [f32::NAN, 0.0, f32::INFINITY, 9.0], class: 0, score: None };
    assert_eq!(drawn(&[bad], 50, 50), drawn(&[], 50, 50));
}

#[test]
fn a_mosaic_holds_every_image_in_reading_order() {
    let cell = |value: u8| DrawImage {
        image: RgbImage::from_pixel(100, 50, Rgb([value; 3])),
        boxes: vec![],
        title: String::new(),
    };
    let cells: Vec<DrawImage> = [10, 20, 30].into_iter().map(cell).collect();
    let sheet = mosaic(&cells, &names(), MosaicArgs { columns: 2, cell_px: 100 });
    assert_eq!(sheet.dimensions(), (212, 112));
    assert_eq!(sheet.get_pixel(50, 20).0, [10; 3]);
    assert_eq!(sheet.get_pixel(150, 20).0, [20; 3]);
    assert_eq!(sheet.get_pixel(50, 80).0, [30; 3]);
}

#[test]
fn a_mosaic_scales_boxes_with_their_image() {
    let cell = DrawImage {
        image: RgbImage::from_pixel(800, 800, Rgb([0; 3])),
        boxes: vec![DrawBox { xyxy: [200.0, 200.0, 600.0, 600.0], class: 2, score: None }],
        title: "a.jpg".into(),
    };
    let sheet = mosaic(&[cell], &[], MosaicArgs { columns: 0, cell_px: 200 });
    assert_eq!(sheet.dimensions(), (208, 208));
    assert_eq!(sheet.get_pixel(4 + 100, 4 + 150).0, class_colour(2));
}

#[test]
fn an_empty_mosaic_is_a_picture() {
    assert!(mosaic(&[], &[], MosaicArgs::default()).width() > 0);
}

#[test]
fn text_is_elided_to_its_width_and_unknown_characters_are_drawn() {
    let short = elide("a_very_long_file_name_0001.jpg", 12.0, 80.0);
    assert!(short.ends_with('…') && text_width(&short, 12.0) <= 80.0 && short.chars().count() > 4);
    assert_eq!(elide("ok", 12.0, 80.0), "ok");
    assert_eq!(elide("anything", 12.0, 0.5), "");
    assert!(text_width("漢字 😀\n\t", 12.0) > 0.0);
}

#[test]
fn a_translucent_line_has_one_tone_where_its_segments_meet() {
    let mut image = RgbImage::from_pixel(40, 40, Rgb([255; 3]));
    let mut canvas = Canvas::new(&mut image);
    canvas.polyline(&[(5.0, 20.5), (20.0, 20.5), (35.0, 20.5)], 4.0, [0, 0, 0], 0.5);
    assert_eq!(image.get_pixel(12, 20), image.get_pixel(20, 20));
    assert_eq!(image.get_pixel(20, 5).0, [255; 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_box_on_any_image_is_drawn_without_fault(
        xyxy in prop::array::uniform4(prop_oneof![-1e9f32..1e9, -50.0f32..150.0, Just(f32::NAN)]),
        class in 0usize..300,
        size in (1u32..120, 1u32..120),
    ) {
        let image = drawn(&[DrawBox { xyxy, class, score: Some(0.5) }], size.0, size.1);
        prop_assert_eq!(image.dimensions(), size);
    }

    #[test]
    fn any_line_is_drawn_without_fault(
        points in prop::collection::vec((-1e7f32..1e7, prop_oneof![-1e7f32..1e7, Just(f32::NAN)]), 0..6),
        width in 0.0f32..20.0,
    ) {
        let mut image = RgbImage::new(60, 40);
        let mut canvas = Canvas::new(&mut image);
        canvas.polyline(&points, width, [255; 3], 0.7);
    }
}
