//! Workers in memory: a network to reach them by, and what they do to those who ask.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::duplex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::plan::What;
use crate::upstream::{Network, Stream};

const PIPE_BYTES: usize = 8 << 10;
const THINKS: Duration = Duration::from_millis(200);
const PAUSES: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Well,
    Hanging,
    Answering(StatusCode),
}

/// One worker: its address stays, its process comes and goes.
#[derive(Debug)]
pub struct Worker {
    pub url: String,
    mood: watch::Sender<Mood>,
    /// Its connections; None while its process is down.
    process: Mutex<Option<JoinSet<()>>>,
    starts: Mutex<u64>,
    log: Mutex<Log>,
}

/// What it remembers, over all its processes.
#[derive(Debug, Default)]
struct Log {
    received: HashSet<String>,
    finished: HashSet<String>,
}

impl Worker {
    fn new(number: usize) -> Arc<Self> {
        let worker = Self {
            url: format!("http://worker-{number}:80"),
            mood: watch::Sender::new(Mood::Well),
            process: Mutex::default(),
            starts: Mutex::new(0),
            log: Mutex::default(),
        };
        worker.start();
        Arc::new(worker)
    }

    fn start(&self) {
        self.process.lock().get_or_insert_with(|| {
            *self.starts.lock() += 1;
            JoinSet::new()
        });
    }

    pub fn suffers(&self, what: What) {
        match what {
            What::Joins | What::Leaves => {}
            // Dropped, its connections end.
            What::Dies => drop(self.process.lock().take()),
            What::Starts => self.start(),
            What::Hangs => drop(self.mood.send_replace(Mood::Hanging)),
            What::Answers(status) => drop(self.mood.send_replace(Mood::Answering(status))),
            What::Recovers => drop(self.mood.send_replace(Mood::Well)),
        }
    }

    pub fn has_received(&self, id: &str) -> bool {
        self.log.lock().received.contains(id)
    }

    pub fn has_finished(&self, id: &str) -> bool {
        self.log.lock().finished.contains(id)
    }

    async fn until_not_hanging(&self) -> Mood {
        let mut mood = self.mood.subscribe();
        // The sender lives as long as `self`.
        mood.wait_for(|mood| *mood != Mood::Hanging).await.map_or(Mood::Well, |mood| *mood)
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<BoxBody<Bytes, Infallible>>, hyper::Error> {
        let mood = self.until_not_hanging().await;
        let (head, body) = request.into_parts();
        if head.method == hyper::Method::GET {
            let start = *self.starts.lock();
            return Ok(json(StatusCode::OK, format!(r#"{{"random_seed":{start}}}"#)));
        }
        let body = body.collect().await?.to_bytes();
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        let id = text("x-request-id").unwrap_or_default().to_owned();
        self.log.lock().received.insert(id.clone());
        if let Mood::Answering(status) = mood {
            return Ok(json(status, r#"{"error":{"message":"simulated"}}"#.to_owned()));
        }
        tokio::time::sleep(THINKS).await;
        self.until_not_hanging().await;
        let asked: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let said = format!(r#"{{"worker":"{}","id":"{id}"}}"#, self.url);
        if asked["stream"] != true {
            self.log.lock().finished.insert(id);
            return Ok(json(StatusCode::OK, said));
        }
        let chunks = asked["chunks"].as_u64().unwrap_or(1);
        let events = stream::iter(0..=chunks).then(move |number| {
            let (worker, said, id) = (self.clone(), said.clone(), id.clone());
            async move {
                tokio::time::sleep(PAUSES).await;
                worker.until_not_hanging().await;
                let event = if number < chunks {
                    format!("data: {said}\n\n")
                } else {
                    worker.log.lock().finished.insert(id);
                    "data: [DONE]\n\n".to_owned()
                };
                Ok(Frame::data(Bytes::from(event)))
            }
        });
        let mut response = Response::new(BodyExt::boxed(StreamBody::new(events)));
        let kind = header::HeaderValue::from_static("text/event-stream");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        Ok(response)
    }
}

fn json(status: StatusCode, body: String) -> Response<BoxBody<Bytes, Infallible>> {
    let mut response = Response::new(Full::new(Bytes::from(body)).boxed());
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// All workers, by number, and the way to them.
#[derive(Debug)]
pub struct Cluster {
    pub workers: Vec<Arc<Worker>>,
    by_address: HashMap<String, Arc<Worker>>,
}

impl Cluster {
    pub fn new(workers: usize) -> Arc<Self> {
        let workers: Vec<_> = (0..workers).map(Worker::new).collect();
        let address = |worker: &Worker| worker.url.trim_start_matches("http://").to_owned();
        let by_address = workers.iter().map(|worker| (address(worker), worker.clone())).collect();
        Arc::new(Self { workers, by_address })
    }

    pub fn by_url(&self, url: &str) -> &Arc<Worker> {
        &self.by_address[url.trim_start_matches("http://")]
    }
}

impl Network for Cluster {
    fn dial<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let worker = &self.by_address[address];
            if *worker.mood.borrow() == Mood::Hanging {
                worker.until_not_hanging().await;
            }
            let mut process = worker.process.lock();
            let Some(connections) = process.as_mut() else {
                return Err(io::ErrorKind::ConnectionRefused.into());
            };
            let (near, far) = duplex(PIPE_BYTES);
            let service = service_fn({
                let worker = worker.clone();
                move |request| worker.clone().answer(request)
            });
            let connection = http1::Builder::new().serve_connection(TokioIo::new(far), service);
            connections.spawn(async move {
                // A router that leaves is no fault of this worker's.
                let _ = connection.await;
            });
            Ok(Stream::Memory(near))
        })
    }

    fn resolve<'a>(&'a self, _: &'a str, _: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        Box::pin(async { Err(io::ErrorKind::NotFound.into()) })
    }
}
