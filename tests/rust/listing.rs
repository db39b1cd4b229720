//! Many traces at once: batches, pages, filters, exports, statistics.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::{Router, Simulated, encoded, request};

const REQUESTS: usize = 24;

/// A router that has ended `REQUESTS` requests `r0`, `r1`, …: every third a chat, every fourth refused.
async fn used() -> (Simulated, Router) {
    let sims = Simulated::start(2).await;
    let router = Router::ready(&sims.urls(), &[]).await;
    for number in 0..REQUESTS {
        send(&router, number).await;
    }
    (sims, router)
}

async fn send(router: &Router, number: usize) {
    let (path, body) = match (number % 4, number % 3) {
        (3, _) => ("/generate", json!({"model": "none"})),
        (_, 2) => {
            let messages = json!([{"role": "user", "content": "a, \"b\"\nc"}]);
            let model = "chat, \"quoted\"\nand broken";
            ("/v1/chat/completions", json!({"model": model, "messages": messages, "max_tokens": 1}))
        }
        _ => (
            "/generate",
            json!({"text": "x", "sampling_params": {"max_new_tokens": 1}, "rid": format!("w{number}")}),
        ),
    };
    let headers = [("x-request-id", &*format!("r{number}"))];
    let answer = router.ask(request(&format!("POST {path}"), &headers, body.to_string())).await;
    assert_eq!(answer.status() == 200, number % 4 != 3, "{}", answer.text());
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().expect("a list").clone()
}

fn ids(traces: &[Value]) -> Vec<String> {
    let id = |trace: &Value| trace["request_id"].as_str().expect("an id").to_owned();
    traces.iter().map(id).collect()
}

fn newest_first(numbers: impl DoubleEndedIterator<Item = usize>) -> Vec<String> {
    numbers.rev().map(|number| format!("r{number}")).collect()
}

/// All pages of a listing, each of at most `limit`; `between` runs after each page.
async fn pages(
    router: &Router,
    query: &str,
    limit: usize,
    mut between: impl AsyncFnMut(),
) -> Vec<Value> {
    let mut all = Vec::new();
    let mut cursor = String::new();
    loop {
        let answer = router.get(&format!("/v1/traces?limit={limit}{query}{cursor}")).await;
        assert_eq!(answer.status(), 200, "{}", answer.text());
        let page = list(&answer.json());
        let next = answer.header("x-next-cursor");
        assert!(page.len() == limit || (page.len() < limit && next.is_none()));
        all.extend(page);
        let Some(next) = next else { return all };
        cursor = format!("&cursor={next}");
        between().await;
    }
}

#[tokio::test]
async fn a_batch_is_in_the_order_asked_for() {
    let (_sims, router) = used().await;
    let wanted = json!({"request_ids": ["r5", "nobody", "r1", "r23", "r5", "", "r0"]});
    let answer = router.post("/v1/traces/batch", wanted.to_string()).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(ids(&list(&answer.json())), ["r5", "r1", "r23", "r5", "r0"]);
    assert_eq!(answer.json()[1], router.trace_now("r1").await);
}

#[tokio::test]
async fn pages_leave_nothing_out_and_repeat_nothing() {
    let (_sims, router) = used().await;
    for limit in [1, 5, 8, REQUESTS, 1000] {
        let all = pages(&router, "", limit, async || {}).await;
        assert_eq!(ids(&all), newest_first(0..REQUESTS), "limit {limit}");
    }
    // Without a limit all fit.
    assert_eq!(list(&router.json("/v1/traces").await).len(), REQUESTS);
    let mut next = REQUESTS;
    let all = pages(&router, "", 7, async || {
        send(&router, next).await;
        next += 1;
    })
    .await;
    assert_eq!(ids(&all), newest_first(0..REQUESTS), "what came meanwhile is newer");
    let failed = pages(&router, "&status=failed&until=9999999999", 2, async || {}).await;
    assert_eq!(ids(&failed), newest_first((0..next).filter(|number| number % 4 == 3)));
}

#[tokio::test]
async fn filters_choose_and_join() {
    let (sims, router) = used().await;
    let all = list(&router.json("/v1/traces").await);
    let middle = all[REQUESTS / 2]["timestamp"].as_str().expect("a time");
    let chat = "chat, \"quoted\"\nand broken";
    let is = |name: &'static str, value: &str| {
        let value = value.to_owned();
        Box::new(move |trace: &Value| trace[name] == *value) as Box<dyn Fn(&Value) -> bool>
    };
    let from = middle.to_owned();
    let later = move |trace: &Value| trace["timestamp"].as_str() >= Some(&*from);
    let earlier = {
        let later = later.clone();
        move |trace: &Value| !later(trace)
    };
    type Rule = Box<dyn Fn(&Value) -> bool>;
    let cases: Vec<(String, Rule)> = vec![
        ("request_id=r7".into(), is("request_id", "r7")),
        ("worker_request_id=w4".into(), is("worker_request_id", "w4")),
        ("node_id=gpu_1".into(), is("node_id", "gpu_1")),
        (format!("worker_url={}", encoded(&sims.urls[0])), is("worker_url", &sims.urls[0])),
        ("status=failed".into(), is("status", "failed")),
        ("status=queued".into(), is("status", "queued")),
        ("route=%2Fv1%2Fchat%2Fcompletions".into(), is("route", "/v1/chat/completions")),
        (format!("model={}", encoded(chat)), is("model", chat)),
        ("policy=round_robin".into(), Box::new(|_| true)),
        ("policy=random".into(), Box::new(|_| false)),
        (format!("since={}", encoded(middle)), Box::new(later)),
        (format!("until={}", encoded(middle)), Box::new(earlier)),
        ("since=0&until=1".into(), Box::new(|_| false)),
        ("node_id=gpu_1&status=failed".into(), {
            Box::new(|trace| trace["node_id"] == "gpu_1" && trace["status"] == "failed")
        }),
    ];
    for (query, rule) in cases {
        let expected: Vec<Value> = all.iter().filter(|trace| rule(trace)).cloned().collect();
        assert_eq!(list(&router.json(&format!("/v1/traces?{query}")).await), expected, "{query}");
    }
}

#[tokio::test]
async fn exports_say_what_the_listing_says() {
    let (_sims, router) = used().await;
    let listed = list(&router.json("/v1/traces").await);

    let answer = router.get("/v1/traces?format=jsonl").await;
    assert_eq!(answer.header("content-type").as_deref(), Some("application/jsonl"));
    let lines: Vec<Value> =
        answer.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines, listed);

    let answer = router.get("/v1/traces?format=csv").await;
    assert!(answer.header("content-type").is_some_and(|it| it.starts_with("text/csv")));
    let mut reader = csv::Reader::from_reader(answer.body.as_slice());
    let columns = reader.headers().expect("a header").clone();
    assert_eq!(
        columns.iter().take(4).collect::<Vec<_>>(),
        ["request_id", "worker_url", "node_id", "timestamp"]
    );
    assert_eq!(columns.len(), listed[0].as_object().expect("an object").len());
    let rows: Vec<csv::StringRecord> = reader.records().map(|row| row.expect("a row")).collect();
    assert_eq!(rows.len(), listed.len());
    for (row, trace) in rows.iter().zip(&listed) {
        for (column, cell) in columns.iter().zip(row) {
            match &trace[column] {
                Value::Null => assert_eq!(cell, "", "{column}"),
                Value::String(text) => assert_eq!(cell, text, "{column}"),
                value => assert_eq!(&serde_json::from_str::<Value>(cell).expect(column), value),
            }
        }
    }

    let answer = router.get("/v1/traces?format=jsonl&status=failed&limit=2").await;
    assert_eq!(answer.text().lines().count(), 2);
    let answer = router.get("/v1/traces?format=csv&request_id=nobody").await;
    assert_eq!(answer.text().lines().count(), 1, "the header alone");
}

#[tokio::test]
async fn an_export_of_many_pages_is_whole() {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), &[]).await;
    let mut client = router.connect().await;
    let one = request("POST /generate", &[], "{}");
    let count = 2_345;
    for _ in 0..count {
        client.ask(&one).await;
    }
    let answer = router.get("/v1/traces?format=csv").await;
    let mut reader = csv::Reader::from_reader(answer.body.as_slice());
    let mut ids: Vec<String> =
        reader.records().map(|row| row.expect("a row")[0].to_owned()).collect();
    assert_eq!(ids.len(), count);
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count);
}

#[tokio::test]
async fn statistics_add_up() {
    let (_sims, router) = used().await;
    let refused = request("POST /generate", &[("x-sglang-target-worker", "nobody")], "{}");
    router.ask(refused).await;
    let total = REQUESTS + 1;
    let listed = list(&router.json("/v1/traces").await);
    let stats = router.json("/v1/traces/stats").await;
    let count_by = |name: &str| {
        let mut counts = BTreeMap::<String, u64>::new();
        for trace in &listed {
            if let Some(value) = trace[name].as_str() {
                *counts.entry(value.to_owned()).or_default() += 1;
            }
        }
        counts
    };
    let told = |name: &str| {
        let counts = stats[name].as_object().expect("an object").iter();
        let counts = counts.map(|(name, count)| (name.clone(), count.as_u64().expect("a count")));
        counts.filter(|(_, count)| *count > 0).collect::<BTreeMap<_, _>>()
    };
    for (since_start, now, field) in [
        ("requests_per_node", "node_distribution", "node_id"),
        ("requests_per_status", "status_distribution", "status"),
        ("requests_per_route", "route_distribution", "route"),
    ] {
        assert_eq!(told(since_start), count_by(field), "{since_start}");
        assert_eq!(told(now), count_by(field), "{now}");
    }
    for name in ["total_requests", "active_traces", "total_traces"] {
        assert_eq!(stats[name], total, "{name}");
    }
    for (name, count) in [("unrouted", 1), ("evicted", 0), ("expired", 0), ("in_flight", 0)] {
        assert_eq!(stats[name], count, "{name}");
    }
    assert_eq!(stats["newest_trace"], listed[0]["timestamp"]);
    assert_eq!(stats["oldest_trace"], listed[total - 1]["timestamp"]);
    assert!(stats["memory_bytes"].as_u64() > Some(0));
    assert_eq!(stats["config"]["max_trace_entries"], 100_000);
    assert!(stats["version"].is_string());
    let served: Vec<_> = router.until_idle().await;
    let completed: u64 = served.iter().map(|(_, served, _)| served).sum();
    assert_eq!(told("requests_per_status")["completed"], completed);
}
