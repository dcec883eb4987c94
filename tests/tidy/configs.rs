//! Every file in `configs/` parses as what it is.
