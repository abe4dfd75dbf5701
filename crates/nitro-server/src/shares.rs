//! The share of the server each client gets.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::client::Client;

/// What one client may do.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientLimits {
    /// Requests at once, waiting ones included.
    pub requests: Option<usize>,
    /// Pictures per minute, as many of them at once.
    pub pictures_per_minute: Option<u32>,
}

/// Keeps clients within their limits.
#[derive(Clone, Debug)]
pub(crate) struct Shares {
    limits: ClientLimits,
    clients: Arc<Mutex<HashMap<Client, Share>>>,
}

#[derive(Debug)]
struct Share {
    running: usize,
    /// Pictures that may be asked for now.
    tokens: f64,
    at: Instant,
}

/// A client asked too much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Exceeded {
    Requests { limit: usize },
    Pictures { limit: u32, wait: Duration },
}

impl Shares {
    pub(crate) fn new(limits: ClientLimits) -> Self {
        Self {
            limits,
            clients: Arc::default(),
        }
    }

    /// Room for a request of `pictures` pictures, until the pass is dropped.
    pub(crate) fn enter(&self, client: &Client, pictures: usize) -> Result<Pass, Exceeded> {
        self.enter_at(client, pictures, Instant::now())
    }

    fn enter_at(&self, client: &Client, pictures: usize, now: Instant) -> Result<Pass, Exceeded> {
        let mut clients = lock(&self.clients);
        let burst = f64::from(self.limits.pictures_per_minute.unwrap_or(u32::MAX));
        let share = clients.entry(client.clone()).or_insert(Share {
            running: 0,
            tokens: burst,
            at: now,
        });
        let elapsed = now.saturating_duration_since(share.at).as_secs_f64();
        share.tokens = (share.tokens + elapsed * burst / 60.0).min(burst);
        share.at = now;
        if let Some(limit) = self.limits.requests
            && share.running >= limit
        {
            return Err(Exceeded::Requests { limit });
        }
        if let Some(limit) = self.limits.pictures_per_minute {
            let missing = pictures as f64 - share.tokens;
            if missing > 0.0 {
                let wait = Duration::from_secs_f64(missing * 60.0 / f64::from(limit.max(1)));
                return Err(Exceeded::Pictures { limit, wait });
            }
            share.tokens -= pictures as f64;
        }
        share.running += 1;
        // Whoever has nothing running and a full bucket is as good as unknown.
        if clients.len() > 1024 {
            clients.retain(|_, s| s.running > 0 || s.at + Duration::from_secs(60) > now);
        }
        Ok(Pass {
            client: client.clone(),
            clients: self.clients.clone(),
        })
    }
}

/// A running request's place in its client's share.
#[derive(Debug)]
pub(crate) struct Pass {
    client: Client,
    clients: Arc<Mutex<HashMap<Client, Share>>>,
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some(share) = lock(&self.clients).get_mut(&self.client) {
            share.running -= 1;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_its_share_and_no_more() {
        let shares = Shares::new(ClientLimits {
            requests: Some(2),
            pictures_per_minute: Some(6),
        });
        let now = Instant::now();
        let (a, b) = (Client::Key("a".into()), Client::Key("b".into()));
        let first = shares.enter_at(&a, 4, now).unwrap();
        let second = shares.enter_at(&a, 1, now).unwrap();
        assert_eq!(
            shares.enter_at(&a, 1, now).unwrap_err(),
            Exceeded::Requests { limit: 2 }
        );
        assert!(
            shares.enter_at(&b, 1, now).is_ok(),
            "others are not touched"
        );
        drop((first, second));
        // One of six is left; ten seconds bring the next.
        let wait = Duration::from_secs(10);
        assert_eq!(
            shares.enter_at(&a, 2, now).unwrap_err(),
            Exceeded::Pictures { limit: 6, wait }
        );
        assert!(shares.enter_at(&a, 2, now + wait).is_ok());
    }
}
