//! Connections that cannot hold the server up: their number is bounded, and one that neither asks nor
//! reads for too long is closed.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// A connection without a request, or whose client takes nothing, is kept this long.
const IDLE: Duration = Duration::from_secs(60);

/// A listener of at most so many connections; more wait in the system's queue.
pub(crate) struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
    open: Gauge,
    idle: Duration,
}

impl Bounded {
    pub(crate) fn new(listener: TcpListener, connections: usize, open: Gauge) -> Self {
        Self {
            listener,
            places: Arc::new(Semaphore::new(connections.max(1))),
            open,
            idle: IDLE,
        }
    }
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = Peer;

    async fn accept(&mut self) -> (Connection, Peer) {
        // The semaphore is never closed; without a place there would be nothing to return.
        let place = self.places.clone().acquire_owned().await.ok();
        // axum's accept waits where the system is out of file descriptors.
        let (stream, address) = Listener::accept(&mut self.listener).await;
        // Events and small answers go out at once.
        let _ = stream.set_nodelay(true);
        self.open.inc();
        let activity = Arc::new(Activity::new());
        let peer = Peer {
            address,
            activity: activity.clone(),
        };
        let connection = Connection {
            stream,
            activity,
            reading: Box::pin(tokio::time::sleep(self.idle)),
            writing: None,
            idle: self.idle,
            open: self.open.clone(),
            _place: place,
        };
        (connection, peer)
    }

    fn local_addr(&self) -> io::Result<Peer> {
        Ok(Peer {
            address: self.listener.local_addr()?,
            activity: Arc::new(Activity::new()),
        })
    }
}

/// Who is at the other end, for handlers.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    activity: Arc<Activity>,
}

impl Connected<IncomingStream<'_, Bounded>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Bounded>) -> Self {
        stream.remote_addr().clone()
    }
}

impl Peer {
    /// A request of this connection is being answered, until the guard is dropped.
    pub(crate) fn busy(&self) -> Busy {
        self.activity.requests.fetch_add(1, Ordering::SeqCst);
        Busy(self.activity.clone())
    }
}

#[derive(Debug)]
struct Activity {
    requests: AtomicUsize,
    /// When something last happened: accepted, an answer begun or written.
    last: Mutex<Instant>,
}

impl Activity {
    fn new() -> Self {
        Self {
            requests: AtomicUsize::new(0),
            last: Mutex::new(Instant::now()),
        }
    }

    fn touch(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Peer::busy`].
#[derive(Debug)]
pub(crate) struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.touch();
        self.0.requests.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A connection that ends itself where nothing happens.
pub(crate) struct Connection {
    stream: TcpStream,
    activity: Arc<Activity>,
    /// Runs while no request is being answered.
    reading: Pin<Box<Sleep>>,
    /// Runs while the client takes nothing.
    writing: Option<Pin<Box<Sleep>>>,
    idle: Duration,
    open: Gauge,
    _place: Option<OwnedSemaphorePermit>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.dec();
    }
}

impl Connection {
    /// What a write that made progress or has to wait means.
    fn wrote(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.writing = None;
            self.activity.touch();
            return written;
        }
        let idle = self.idle;
        let timer = self
            .writing
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(idle)));
        match timer.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if read.is_ready() || self.activity.requests.load(Ordering::SeqCst) > 0 {
            return read;
        }
        // Bytes of a head that never ends do not count: only answers do.
        let until = self.activity.last() + self.idle;
        if self.reading.deadline() != until {
            self.reading.as_mut().reset(until);
        }
        match self.reading.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.wrote(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    async fn read(connection: &mut Connection, bytes: &mut [u8]) -> io::Result<usize> {
        let mut buffer = ReadBuf::new(bytes);
        std::future::poll_fn(|c| Pin::new(&mut *connection).poll_read(c, &mut buffer)).await?;
        Ok(buffer.filled().len())
    }

    fn block_on(work: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(work);
    }

    async fn listener(connections: usize, idle: Duration) -> (Bounded, SocketAddr) {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let bounded = Bounded {
            idle,
            ..Bounded::new(tcp, connections, Gauge::default())
        };
        (bounded, address)
    }

    #[test]
    fn a_connection_that_asks_nothing_is_closed_even_if_it_trickles() {
        block_on(async {
            let (mut listener, address) = listener(4, Duration::from_millis(150)).await;
            let mut client = std::net::TcpStream::connect(address).unwrap();
            let (mut server, peer) = listener.accept().await;
            let trickle = std::thread::spawn(move || {
                while client.write_all(b"x").is_ok() {
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
            let (mut bytes, mut all) = ([0; 8], 0);
            let error = loop {
                match read(&mut server, &mut bytes).await {
                    Ok(count) => all += count,
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(all > 0);
            drop(server);
            trickle.join().unwrap();
            drop(peer);
        });
    }

    #[test]
    fn a_connection_whose_request_is_being_answered_stays() {
        block_on(async {
            let (mut listener, address) = listener(4, Duration::from_millis(50)).await;
            let _client = TcpStream::connect(address).await.unwrap();
            let (mut server, peer) = listener.accept().await;
            let busy = peer.busy();
            let mut byte = [0];
            let wait = Duration::from_millis(300);
            let wait = tokio::time::timeout(wait, read(&mut server, &mut byte));
            assert!(wait.await.is_err(), "still open");
            drop(busy);
            let closed = read(&mut server, &mut byte).await;
            assert_eq!(closed.unwrap_err().kind(), io::ErrorKind::TimedOut);
        });
    }

    #[test]
    fn more_connections_wait_for_a_place() {
        block_on(async {
            let (mut listener, address) = listener(1, IDLE).await;
            let _a = TcpStream::connect(address).await.unwrap();
            let _b = TcpStream::connect(address).await.unwrap();
            let first = listener.accept().await;
            let wait = Duration::from_millis(50);
            assert!(tokio::time::timeout(wait, listener.accept()).await.is_err());
            drop(first);
            listener.accept().await;
            assert_eq!(listener.open.get(), 0);
        });
    }
}
