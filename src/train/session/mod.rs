mod auto_batch;
mod initial;
