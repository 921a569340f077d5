//! A worker whose client is ureq as it comes: two calls for a message, a pause between them.
use std::{env, thread, time::{Duration, Instant}};

fn main() {
    let sidecar = env::var("SIDECAR_URL").unwrap();
    let pause = Duration::from_secs_f64(env::var("PAUSE_SECONDS").unwrap().parse().unwrap());
    let messages = env::var("MESSAGES").map_or(3, |text| text.parse().unwrap());
    let agent = ureq::agent(); // keeps its connections
    for number in 0..messages {
        agent.post(&format!("{sidecar}/start-request")).call().unwrap();
        let start = Instant::now();
        println!("took {number}");
        thread::sleep(pause);
        println!("did {number}");
        let end = format!("{sidecar}/end-request?duration={:?}", start.elapsed());
        agent.post(&end).call().unwrap();
    }
}
