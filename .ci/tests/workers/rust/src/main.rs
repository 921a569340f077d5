//! A worker whose client is ureq as it comes: two calls for a message, and a pause after each.
use std::{env, thread, time::{Duration, Instant}};

fn main() {
    let sidecar = env::var("SIDECAR_URL").unwrap();
    let pause = Duration::from_secs_f64(env::var("PAUSE_SECONDS").unwrap().parse().unwrap());
    for number in 0..3 {
        ureq::post(&format!("{sidecar}/start-request")).call().unwrap();
        let start = Instant::now();
        println!("took {number}");
        thread::sleep(pause);
        println!("did {number}");
        let end = format!("{sidecar}/end-request?duration={:?}", start.elapsed());
        ureq::post(&end).call().unwrap();
    }
}
