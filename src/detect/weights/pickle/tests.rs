use super::*;

#[test]
fn containers_constants_and_memory() {
    // {"a": [1, -2], "b": ("x", True, None, 1.5)}, protocol 2.
    let mut bytes = b"\x80\x02}q\x00(X\x01\x00\x00\x00a]q\x01(K\x01J\xfe\xff\xff\xffeX\x01\x00\x00\x00b(X\x01\x00\x00\x00x\x88NG".to_vec();
    bytes.extend(1.5f64.to_be_bytes());
    bytes.extend(b"tu.");
    let pickle = Pickle::parse(&bytes).expect("valid");
    let list = pickle.sequence(pickle.lookup(pickle.root(), "a").expect("a")).expect("a list");
    assert_eq!(list.iter().map(|i| pickle.integer(*i)).collect::<Vec<_>>(), [Some(1), Some(-2)]);
    let tuple = pickle.sequence(pickle.lookup(pickle.root(), "b").expect("b")).expect("a tuple");
    assert_eq!(pickle.text(tuple[0]), Some("x"));
    assert!(matches!(pickle.node(tuple[3]), Node::Float(v) if *v == 1.5));
}

#[test]
fn calls_stay_records_and_bad_streams_are_errors() {
    let pickle = Pickle::parse(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.").expect("valid");
    let Node::Object { callee, .. } = pickle.node(pickle.root()) else { panic!("an object") };
    assert_eq!(pickle.global(*callee), Some(("os", "system")));
    let faulty: [&[u8]; 11] = [
        b"",
        b".",
        b"t.",
        b"(a.",
        b"h\x07.",
        b"\x80\x09.",
        b"X\xff\xff\xff\xffa.",
        b"c\nos",
        b"I1\n.",
        b"\x8a\x09123456789.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.",
    ];
    for bytes in faulty {
        assert!(Pickle::parse(bytes).is_err(), "{bytes:?}");
    }
}
