//! Workers on a network in memory and on a paused clock.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;

use clap::Parser;
use futures_util::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::Instant;

use super::*;
use crate::routing::candidates::Weighed;
use crate::routing::{Pick, PickError, Request};
use crate::upstream::Stream;

/// Options as the command line gives them.
pub(super) fn options(argv: &[&str]) -> Options {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }
    Line::try_parse_from([&["router"], argv].concat()).expect("options").options
}

/// What a worker does to whoever dials it.
#[derive(Clone)]
enum Does {
    Refuses,
    Hangs,
    /// Answers everything with this status and body.
    Answers(u16, String),
}

fn good(info: &str) -> Does {
    Does::Answers(200, info.to_owned())
}

/// A network of workers that do as they are told.
#[derive(Default)]
struct Scripted {
    does: Mutex<HashMap<String, Does>>,
    /// None: the resolver fails.
    addresses: Mutex<Option<Vec<SocketAddr>>>,
    /// Of names that have addresses of their own.
    of_name: Mutex<HashMap<String, Vec<SocketAddr>>>,
    dialled_at: Mutex<Vec<Instant>>,
    resolved: AtomicU64,
}

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scripted")
    }
}

impl Scripted {
    fn set(&self, address: &str, does: Does) {
        self.does.lock().insert(address.to_owned(), does);
    }

    fn resolves_to(&self, addresses: &[&str]) {
        *self.addresses.lock() = Some(parsed(addresses));
    }

    fn resolves_name_to(&self, name: &str, addresses: &[&str]) {
        self.of_name.lock().insert(name.to_owned(), parsed(addresses));
    }

    fn dials(&self) -> usize {
        self.dialled_at.lock().len()
    }
}

fn parsed(addresses: &[&str]) -> Vec<SocketAddr> {
    addresses.iter().map(|address| address.parse().expect("an address")).collect()
}

impl Network for Scripted {
    fn dial<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        self.dialled_at.lock().push(Instant::now());
        let does = self.does.lock().get(address).cloned();
        Box::pin(async move {
            match does {
                None | Some(Does::Refuses) => Err(io::ErrorKind::ConnectionRefused.into()),
                Some(Does::Hangs) => std::future::pending().await,
                Some(Does::Answers(status, body)) => {
                    let (near, far) = tokio::io::duplex(1 << 16);
                    tokio::spawn(answer_all(far, status, body));
                    Ok(Stream::Memory(near))
                }
            }
        })
    }

    fn resolve<'a>(&'a self, name: &'a str, _: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        self.resolved.fetch_add(1, Ordering::Relaxed);
        let own = self.of_name.lock().get(name).cloned();
        let addresses = own.or_else(|| self.addresses.lock().clone());
        Box::pin(async move { addresses.ok_or_else(|| io::Error::other("no such name")) })
    }
}

/// One request, one answer, and the end of the connection.
async fn answer_all(mut stream: DuplexStream, status: u16, body: String) {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let head =
        format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close", body.len());
    // The router may be gone.
    let _ = stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await;
}

/// Notes whom it was told to forget.
#[derive(Default)]
struct Forgetful {
    forgotten: Mutex<Vec<u32>>,
}

impl Policy for Forgetful {
    fn pick(
        &self,
        _: &Request,
        _: &[Arc<Target>],
        _: &mut fastrand::Rng,
        _: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        Ok(Pick { index: 0, reason: "first", matched_tokens: None })
    }

    fn forget(&self, worker: u32) {
        self.forgotten.lock().push(worker);
    }
}

struct Fleet {
    workers: Arc<Workers>,
    network: Arc<Scripted>,
    policy: Arc<Forgetful>,
}

/// Workers of these options, not started.
fn fleet(argv: &[&str]) -> Fleet {
    let (network, policy) = (Arc::new(Scripted::default()), Arc::new(Forgetful::default()));
    let upstream = upstream::Options { connect_timeout_secs: 5 };
    let workers = Workers::new(options(argv), &upstream, policy.clone(), network.clone(), None);
    Fleet { workers, network, policy }
}

impl Fleet {
    fn all(&self) -> Vec<Arc<Worker>> {
        self.workers.snapshot().all.clone()
    }

    fn urls(&self) -> Vec<String> {
        self.all().iter().map(|worker| worker.url.to_string()).collect()
    }

    fn routable(&self) -> Vec<u32> {
        self.workers.snapshot().routable.iter().map(|worker| worker.index).collect()
    }

    fn joins(&self, url: &str) -> Joined {
        let joining = Joining::at(url.parse().expect("a URL"));
        self.workers.join(joining).expect("room")
    }

    /// Waits until so many workers may be picked. The clock is paused, so this takes no time.
    async fn until_routable(&self, count: usize) {
        self.until(|snapshot| snapshot.routable.len() == count).await;
    }

    async fn until(&self, is_so: impl Fn(&Snapshot) -> bool) {
        let hour = Duration::from_secs(3600);
        tokio::time::timeout(hour, self.workers.until(is_so)).await.expect("within an hour");
    }

    fn forgotten(&self) -> Vec<u32> {
        self.policy.forgotten.lock().clone()
    }
}

async fn seconds(count: u64) {
    tokio::time::sleep(Duration::from_secs(count)).await;
}

const TWO: [&str; 3] = ["--worker-urls", "http://a:30001", "http://b:30002"];
const ONE: [&str; 2] = ["--worker-urls", "http://a:30001"];
const DNS: [&str; 2] = ["--worker-urls", "dns+http://w:30001"];

#[test]
fn the_snapshot_follows_health() {
    let Fleet { workers, .. } = fleet(&TWO);
    assert_eq!(workers.snapshot().routable.len(), 0);
    let all = workers.snapshot().all.clone();
    workers.checked(&all[1], Ok(()));
    assert_eq!(workers.snapshot().routable[0].node_id(), Some("gpu_1"));
    workers.unreachable(&all[1]);
    assert_eq!(workers.snapshot().routable.len(), 0);
    workers.checked(&all[1], Ok(()));
    assert_eq!(workers.snapshot().targets.len(), 1);
}

#[test]
fn the_first_round_ends_when_the_last_one_lets_go() {
    let Fleet { workers, .. } = fleet(&TWO);
    let one = Arc::new(FirstRound(workers.clone()));
    let other = one.clone();
    drop(one);
    assert!(!workers.first_round_ended());
    drop(other);
    assert!(workers.first_round_ended());
}

#[test]
fn names_that_are_the_workers_own_word_are_given_when_the_round_ends() {
    let Fleet { workers, .. } = fleet(&[&TWO[..], &["--node-id-from", "gpu"]].concat());
    let all = workers.snapshot().all.clone();
    let info = ServerInfo::parse(br#"{"base_gpu_id":3}"#).expect("an object");
    workers.told(&all[0], info.clone());
    workers.checked(&all[0], Ok(()));
    assert_eq!(workers.snapshot().routable.len(), 0, "no name yet");
    workers.end_first_round();
    assert_eq!(workers.snapshot().routable[0].node_id(), Some("gpu_3"));
    workers.told(&all[1], info);
    workers.checked(&all[1], Ok(()));
    assert_eq!(all[1].node_id(), Some("gpu_3@b:30002"), "a latecomer gives way");
}

#[test]
fn without_checks_every_worker_is_routable_at_once() {
    let Fleet { workers, .. } = fleet(&[&TWO[..], &["--disable-health-check"]].concat());
    assert!(workers.first_round_ended());
    assert_eq!(workers.snapshot().routable.len(), 2);
    workers.unreachable(&workers.snapshot().all[0]);
    assert_eq!(workers.snapshot().routable.len(), 2);
}

#[test]
fn a_worker_is_found_by_name_by_url_and_by_id() {
    let snapshot = fleet(&TWO).workers.snapshot();
    assert_eq!(snapshot.find("gpu_1").expect("name").index, 1);
    assert_eq!(snapshot.find("http://A:30001/").expect("url").index, 0);
    assert_eq!(snapshot.find_by_id("1").expect("id").index, 1);
    assert_eq!(snapshot.find_by_id("gpu_0").expect("name").index, 0);
    assert!(snapshot.find("gpu_9").is_none() && snapshot.find("1").is_none());
}

#[test]
fn weights_are_checked_together() {
    let check = |argv: &[&str]| options(&[&TWO[..], argv].concat()).check();
    assert!(check(&["--worker-weights", "http://a:30001=0"]).is_ok());
    let zeros = ["--worker-weights", "http://a:30001=0", "http://b:30002=0"];
    assert!(check(&zeros).expect_err("zeros").1.contains("weight 0"));
    let stranger = ["--worker-weights", "http://c:1=1"];
    assert!(check(&stranger).expect_err("stranger").1.contains("not one of worker_urls"));
    let unless_it_may_turn_up = [&stranger[..], &DNS[..]].concat();
    assert!(check(&unless_it_may_turn_up).is_ok());
}

#[test]
fn a_source_is_named_once_and_workers_have_a_bound() {
    let twice = options(&["--worker-urls", "dns+http://w:1", "dns+http://W:1/"]).check();
    assert!(twice.expect_err("twice").1.contains("same worker"));
    let urls: Vec<String> =
        (0..=WORKERS_MAX).map(|n| format!("--worker-urls=http://h{n}:1")).collect();
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    assert!(options(&urls).check().expect_err("too many").1.contains("at most 4096"));
}

#[tokio::test(start_paused = true)]
async fn a_worker_joins_once_and_its_index_is_its_own() {
    let fleet = fleet(&[]);
    fleet.network.set("a:1", good("{}"));
    fleet.workers.start_checks();
    let first = fleet.joins("http://a:1");
    assert!(first.is_new && fleet.routable().is_empty());
    let again = fleet.joins("http://A:1/");
    assert!(!again.is_new && again.worker.index == 0);
    fleet.until_routable(1).await;

    let in_flight = first.worker.target.begin();
    fleet.workers.leave(&first.worker);
    assert!(fleet.routable().is_empty() && first.worker.state().name() == "draining");
    let second = fleet.joins("http://a:1");
    assert!(second.is_new && second.worker.index == 1);
    assert_eq!(fleet.workers.snapshot().find("http://a:1").expect("there").index, 1);
    fleet.until_routable(1).await;
    seconds(600).await;
    assert_eq!(fleet.all().len(), 2, "a request is in flight at the first");
    drop(in_flight);
    fleet.until(|snapshot| snapshot.all.len() == 1).await;
    assert_eq!((fleet.routable(), fleet.forgotten()), (vec![1], vec![0]));
}

#[tokio::test(start_paused = true)]
async fn what_came_with_a_worker_counts_before_the_options() {
    let fleet = fleet(&["--node-ids", "http://a:1=left"]);
    let url: WorkerUrl = "http://a:1".parse().expect("a URL");
    let joining = Joining { weight: Some(2.5), node_id: Some("mine".into()), ..Joining::at(url) };
    let worker = fleet.workers.join(joining).expect("room").worker;
    assert_eq!((worker.node_id(), worker.target.weight), (Some("mine"), 2.5));
}

#[tokio::test(start_paused = true)]
async fn who_is_gone_is_not_checked_any_more() {
    for does in [good("{}"), Does::Refuses, Does::Hangs] {
        let fleet = fleet(&ONE);
        fleet.network.set("a:30001", does);
        fleet.workers.start_checks();
        seconds(7).await;
        fleet.workers.leave(&fleet.all()[0]);
        fleet.until(|snapshot| snapshot.all.is_empty()).await;
        let dials = fleet.network.dials();
        seconds(600).await;
        assert!(dials > 0 && fleet.network.dials() == dials);
        assert!(fleet.workers.first_round_ended());
    }
}

#[tokio::test(start_paused = true)]
async fn who_leaves_is_forgotten_after_the_last_pick_that_could_see_it() {
    let fleet = fleet(&ONE);
    fleet.network.set("a:30001", good("{}"));
    fleet.workers.start_checks();
    fleet.until_routable(1).await;
    let picking = fleet.workers.snapshot();
    fleet.workers.leave(&picking.all[0]);
    seconds(60).await;
    let in_flight = picking.targets[0].begin();
    drop(picking);
    seconds(60).await;
    assert_eq!((fleet.all().len(), fleet.forgotten()), (1, vec![]));
    drop(in_flight);
    fleet.until(|snapshot| snapshot.all.is_empty()).await;
    assert_eq!(fleet.forgotten(), [0]);
}

#[tokio::test(start_paused = true)]
async fn there_is_a_most_of_workers() {
    let fleet = fleet(&["--disable-health-check"]);
    let at = |number| Joining::at(format!("http://h{number}:1").parse().expect("a URL"));
    let joined = fleet.workers.join_all((0..WORKERS_MAX).map(at).collect(), WantedBy::Url, None);
    assert!(joined.iter().all(|joined| joined.as_ref().is_ok_and(|joined| joined.is_new)));
    let one_more = || fleet.workers.join(Joining::at("http://more:1".parse().expect("a URL")));
    assert!(one_more().expect_err("full").to_string().starts_with("4096 workers"));
    assert!(!fleet.joins("http://h7:1").is_new);
    fleet.workers.leave(&fleet.all()[0]);
    fleet.until(|snapshot| snapshot.all.len() == WORKERS_MAX - 1).await;
    assert_eq!(one_more().expect("room").worker.index, WORKERS_MAX as u32);
}

#[tokio::test(start_paused = true)]
async fn an_unreachable_worker_is_probed_each_second_and_one_success_is_enough() {
    let fleet = fleet(&ONE);
    fleet.network.set("a:30001", good("{}"));
    fleet.workers.start_checks();
    fleet.until_routable(1).await;
    // The check of the interval hangs when a request finds nobody.
    fleet.network.set("a:30001", Does::Hangs);
    seconds(61).await;
    fleet.network.set("a:30001", Does::Refuses);
    fleet.network.dialled_at.lock().clear();
    let lost_at = Instant::now();
    fleet.workers.unreachable(&fleet.all()[0]);
    seconds(30).await;
    let dialled_at = fleet.network.dialled_at.lock().clone();
    let mut before = lost_at;
    for at in &dialled_at {
        assert!(*at - before <= Duration::from_secs(1), "{:?}", *at - before);
        before = *at;
    }
    assert!((30..40).contains(&dialled_at.len()), "{}", dialled_at.len());
    fleet.network.set("a:30001", good("{}"));
    let back_at = Instant::now();
    fleet.until_routable(1).await;
    assert!(back_at.elapsed() <= Duration::from_secs(1));
    assert_eq!(fleet.forgotten(), [0]);
}

#[tokio::test(start_paused = true)]
async fn a_hanging_probe_ends_at_its_timeout() {
    let fleet = fleet(&[&ONE[..], &["--health-check-timeout-secs=3"]].concat());
    fleet.network.set("a:30001", good("{}"));
    fleet.workers.start_checks();
    fleet.until_routable(1).await;
    fleet.network.set("a:30001", Does::Hangs);
    fleet.network.dialled_at.lock().clear();
    fleet.workers.unreachable(&fleet.all()[0]);
    seconds(30).await;
    // The next one begins as soon as the one before has failed.
    assert_eq!(fleet.network.dials(), 10);
    assert!(fleet.all()[0].last_error().expect("a reason").contains("within 3 s"));
}

const ONE_START: &str = r#"{"random_seed":1,"startup_time":{"scheduler_e2e":3.25}}"#;
const NEXT_START: &str = r#"{"random_seed":1,"startup_time":{"scheduler_e2e":3.5}}"#;

#[tokio::test(start_paused = true)]
async fn a_restart_between_two_checks_is_noticed() {
    let fleet = fleet(&ONE);
    fleet.network.set("a:30001", good(ONE_START));
    fleet.workers.start_checks();
    seconds(150).await;
    assert!(fleet.forgotten().is_empty());
    fleet.network.set("a:30001", good(NEXT_START));
    seconds(60).await;
    assert_eq!(fleet.forgotten(), [0]);
    seconds(600).await;
    assert_eq!((fleet.forgotten(), fleet.routable()), (vec![0], vec![0]));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_was_unhealthy_says_who_it_is_before_it_is_picked() {
    let fleet = fleet(&ONE);
    fleet.network.set("a:30001", good(ONE_START));
    fleet.workers.start_checks();
    fleet.until_routable(1).await;
    seconds(1).await;
    fleet.network.set("a:30001", Does::Answers(503, String::new()));
    fleet.until_routable(0).await;
    fleet.network.set("a:30001", good(NEXT_START));
    let policy = fleet.policy.clone();
    fleet
        .until(|snapshot| {
            let is_back = !snapshot.routable.is_empty();
            assert!(!is_back || *policy.forgotten.lock() == [0]);
            is_back
        })
        .await;
    // One that was only slow keeps what is believed of its cache.
    fleet.network.set("a:30001", Does::Answers(503, String::new()));
    fleet.until_routable(0).await;
    fleet.network.set("a:30001", good(NEXT_START));
    fleet.until_routable(1).await;
    assert_eq!(fleet.forgotten(), [0]);
}

#[tokio::test(start_paused = true)]
async fn one_that_does_not_say_who_it_is_is_not_taken_for_another() {
    let fleet = fleet(&ONE);
    fleet.network.set("a:30001", good(ONE_START));
    fleet.workers.start_checks();
    seconds(1).await;
    fleet.network.set("a:30001", good("no JSON"));
    seconds(300).await;
    assert!(fleet.all()[0].info().is_some());
    assert_eq!((fleet.forgotten(), fleet.routable()), (vec![], vec![0]));
}

#[tokio::test(start_paused = true)]
async fn the_first_round_waits_for_the_resolver_and_for_what_it_found() {
    let fleet = fleet(&DNS);
    fleet.network.resolves_to(&["10.0.0.1:30001", "[fd00::1]:30001"]);
    fleet.network.set("10.0.0.1:30001", Does::Hangs);
    fleet.network.set("[fd00::1]:30001", Does::Refuses);
    assert!(!fleet.workers.first_round_ended());
    let began = Instant::now();
    fleet.workers.start_checks();
    fleet.workers.first_round_or(|_| false).await;
    assert_eq!(began.elapsed().as_secs(), 5, "as long as the check that hangs");
    assert_eq!(fleet.urls(), ["http://10.0.0.1:30001", "http://[fd00::1]:30001"]);
    let name = |worker: &Arc<Worker>| worker.node_id().expect("a name").to_owned();
    let names: Vec<String> = fleet.all().iter().map(name).collect();
    assert_eq!(names, ["gpu_0@10.0.0.1:30001", "gpu_0@[fd00::1]:30001"]);
}

#[tokio::test(start_paused = true)]
async fn the_first_round_does_not_wait_for_a_name_for_ever() {
    let fleet = fleet(&DNS);
    fleet.workers.start_checks();
    fleet.workers.first_round_or(|_| false).await;
    assert!(fleet.all().is_empty());
    fleet.network.resolves_to(&["10.0.0.1:30001"]);
    fleet.network.set("10.0.0.1:30001", good("{}"));
    fleet.until_routable(1).await;
}

#[tokio::test(start_paused = true)]
async fn workers_follow_the_addresses_of_a_name() {
    let fleet = fleet(&[&DNS[..], &["http://10.0.0.2:30001"]].concat());
    for address in ["10.0.0.1:30001", "10.0.0.2:30001", "10.0.0.3:30001"] {
        fleet.network.set(address, good("{}"));
    }
    fleet.network.resolves_to(&["10.0.0.2:30001", "10.0.0.1:30001", "10.0.0.1:30001"]);
    fleet.workers.start_checks();
    fleet.until_routable(2).await;
    assert_eq!(fleet.urls(), ["http://10.0.0.2:30001", "http://10.0.0.1:30001"]);

    let in_flight = fleet.all()[1].target.begin();
    fleet.network.resolves_to(&["10.0.0.3:30001"]);
    fleet.until(|snapshot| snapshot.routable.iter().any(|worker| worker.index == 2)).await;
    assert_eq!(fleet.routable(), [0, 2], "the one named by its URL stays");
    assert!(fleet.all()[1].is_draining());
    drop(in_flight);
    fleet.until(|snapshot| snapshot.all.len() == 2).await;
    fleet.network.resolves_to(&["10.0.0.1:30001", "10.0.0.3:30001"]);
    fleet.until(|snapshot| snapshot.routable.iter().any(|worker| worker.index == 3)).await;
    assert_eq!(fleet.routable(), [0, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_resolver_in_trouble_removes_nobody() {
    let fleet = fleet(&DNS);
    fleet.network.set("10.0.0.1:30001", good("{}"));
    fleet.network.resolves_to(&["10.0.0.1:30001"]);
    fleet.workers.start_checks();
    fleet.until_routable(1).await;
    *fleet.network.addresses.lock() = None;
    seconds(60).await;
    assert_eq!(fleet.routable(), [0]);
    fleet.network.resolves_to(&[]);
    seconds(60).await;
    assert_eq!(fleet.routable(), [0]);
    assert!(fleet.network.resolved.load(Ordering::Relaxed) >= 24);
}

#[tokio::test(start_paused = true)]
async fn who_was_removed_by_hand_stays_away_until_the_name_has_lost_it() {
    let fleet = fleet(&DNS);
    fleet.network.set("10.0.0.1:30001", good("{}"));
    fleet.network.set("10.0.0.2:30001", good("{}"));
    fleet.network.resolves_to(&["10.0.0.1:30001", "10.0.0.2:30001"]);
    fleet.workers.start_checks();
    fleet.until_routable(2).await;
    fleet.workers.leave(&fleet.all()[0]);
    seconds(60).await;
    assert_eq!(fleet.routable(), [1]);
    fleet.network.resolves_to(&["10.0.0.2:30001"]);
    seconds(10).await;
    fleet.network.resolves_to(&["10.0.0.1:30001", "10.0.0.2:30001"]);
    seconds(10).await;
    assert_eq!(fleet.routable(), [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn who_is_an_address_of_two_names_stays_until_both_have_lost_it() {
    let fleet = fleet(&["--worker-urls", "dns+http://a:30001", "dns+http://b:30001"]);
    let (one, two, three) = ("10.0.0.1:30001", "10.0.0.2:30001", "10.0.0.3:30001");
    for address in [one, two, three] {
        fleet.network.set(address, good("{}"));
    }
    fleet.network.resolves_name_to("a", &[one, two]);
    fleet.network.resolves_name_to("b", &[one]);
    fleet.workers.start_checks();
    fleet.until_routable(2).await;
    let worker = |address: &str| {
        let url = format!("http://{address}");
        fleet.workers.snapshot().routable.iter().find(|it| it.url.as_str() == url).cloned()
    };
    let first = worker(one).expect("it is there").index;
    for (name, address) in [("a", two), ("b", three)] {
        // The other name has it still, whichever was there first.
        fleet.network.resolves_name_to(name, &[address]);
        seconds(20).await;
        assert_eq!(worker(one).map(|it| it.index), (name == "a").then_some(first), "{name}");
        assert!(worker(address).is_some());
    }
    fleet.network.resolves_name_to("b", &[one]);
    seconds(20).await;
    assert_ne!(worker(one).expect("it is back").index, first);
}

#[tokio::test(start_paused = true)]
async fn who_joined_by_hand_too_does_not_leave_with_the_name() {
    let fleet = fleet(&DNS);
    fleet.network.set("10.0.0.1:30001", good("{}"));
    fleet.network.set("10.0.0.2:30001", good("{}"));
    fleet.network.resolves_to(&["10.0.0.1:30001", "10.0.0.2:30001"]);
    fleet.workers.start_checks();
    fleet.until_routable(2).await;
    assert!(!fleet.joins("http://10.0.0.1:30001").is_new);
    fleet.network.resolves_to(&["10.0.0.2:30001"]);
    seconds(20).await;
    assert_eq!(fleet.routable(), [0, 1]);
    fleet.workers.leave(&fleet.all()[0]);
    assert_eq!(fleet.routable(), [1]);
}
