//! The block sizes that stand in machine code (an ELF file; section `.nv.info.<kernel>`).

use std::collections::BTreeMap;

/// Entry of a kernel's section: the most threads of a block, three numbers.
const MAX_THREADS: u8 = 0x05;
/// Form of an entry that carries its length.
const SIZED: u8 = 0x04;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let mut number = [0u8; 8];
    number[..N].copy_from_slice(bytes.get(at..at + N)?);
    Some(u64::from_le_bytes(number))
}

/// Threads of a block by kernel; `None` when this is no machine code.
pub fn threads(cubin: &[u8]) -> Option<BTreeMap<String, u32>> {
    if !cubin.starts_with(b"\x7fELF") {
        return None;
    }
    let table = number::<8>(cubin, 40)? as usize;
    let [entry_bytes, count, names] = [58, 60, 62].map(|at| number::<2>(cubin, at).map(|n| n as usize));
    let header = |index: usize| Some(table + index * entry_bytes?);
    let names = number::<8>(cubin, header(names?)? + 24)? as usize;
    let mut found = BTreeMap::new();
    for index in 0..count? {
        let header = header(index)?;
        let name = cubin.get(names + number::<4>(cubin, header)? as usize..)?;
        let name = String::from_utf8_lossy(name.split(|b| *b == 0).next()?);
        if let Some(kernel) = name.strip_prefix(".nv.info.") {
            let (from, bytes) = (number::<8>(cubin, header + 24)?, number::<8>(cubin, header + 32)?);
            let section = cubin.get(from as usize..(from + bytes) as usize)?;
            found.insert(kernel.to_owned(), max_threads(section).unwrap_or(0));
        }
    }
    Some(found)
}

/// The block size in a kernel's section.
fn max_threads(section: &[u8]) -> Option<u32> {
    let mut at = 0;
    while at + 4 <= section.len() {
        let (form, kind, bytes) = (section[at], section[at + 1], number::<2>(section, at + 2)? as usize);
        at += 4;
        if form != SIZED {
            continue;
        }
        if kind == MAX_THREADS {
            let sides: Option<Vec<u64>> = (0..3).map(|side| number::<4>(section, at + 4 * side)).collect();
            return Some(sides?.iter().product::<u64>() as u32);
        }
        at += bytes;
    }
    None
}
