//! Lines from a pipe, with a limit on their length.

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// Longest line kept; the rest of a longer one is dropped.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Reads lines from a pipe. [`Lines::next`] may be cancelled at any await without losing a byte.
pub(super) struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
    ended: bool,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(pipe: R) -> Self {
        Self { reader: BufReader::new(pipe), line: Vec::new(), ended: false }
    }

    /// True after the last line.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// The next line without its end; `None` after the last. Bytes that are no UTF-8 are replaced.
    pub(super) async fn next(&mut self) -> Option<String> {
        while !self.ended {
            let available = match self.reader.fill_buf().await {
                Ok(available) if !available.is_empty() => available,
                // A broken pipe is an end like any other; the exit status tells the rest.
                _ => {
                    self.ended = true;
                    break;
                }
            };
            let newline = available.iter().position(|&byte| byte == b'\n');
            let end = newline.unwrap_or(available.len());
            let room = LINE_BYTES_MAX.saturating_sub(self.line.len());
            self.line.extend_from_slice(&available[..end.min(room)]);
            self.reader.consume(newline.map_or(end, |newline| newline + 1));
            if newline.is_some() {
                return Some(self.take());
            }
        }
        (!self.line.is_empty()).then(|| self.take())
    }

    fn take(&mut self) -> String {
        let line = String::from_utf8_lossy(&self.line).trim_end_matches('\r').to_owned();
        self.line.clear();
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_bounded_and_the_last_needs_no_end() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let long = vec![b'x'; LINE_BYTES_MAX + 10];
            let text = [b"one\r\n\n".as_slice(), &long, b"\nlast \xff"].concat();
            let mut lines = Lines::new(text.as_slice());
            assert_eq!(lines.next().await.as_deref(), Some("one"));
            assert_eq!(lines.next().await.as_deref(), Some(""));
            assert_eq!(lines.next().await.map(|line| line.len()), Some(LINE_BYTES_MAX));
            assert_eq!(lines.next().await.as_deref(), Some("last \u{fffd}"));
            assert_eq!((lines.next().await, lines.ended()), (None, true));
        });
    }
}
