//! Who is next: a queue of jobs of several pictures, fair to small ones.
//!
//! Pictures, not jobs, wait for places in the batch. Each waiting job has a tag, its place in virtual
//! time: a new job gets the present, every picture taken moves its job back by the picture's cost. The
//! lowest tag is served, so jobs take turns, and one picture asked for while ten wait for somebody
//! else comes next but one. Virtual time moves with the work handed out divided by the jobs that
//! share it, so a large job is overtaken by later ones only until its turn comes (weighted fair
//! queueing, Demers, Keshav and Shenker 1989).

/// Jobs that wait, at least with some of their pictures.
#[derive(Debug)]
pub(crate) struct FairQueue<T> {
    entries: Vec<Entry<T>>,
    now: f64,
    arrivals: u64,
}

#[derive(Debug)]
struct Entry<T> {
    id: u64,
    /// What was queued; leaves with the first picture.
    item: Option<T>,
    next: usize,
    pictures: usize,
    cost: f64,
    tag: f64,
    arrival: u64,
}

/// One picture whose turn it is.
#[derive(Debug, PartialEq)]
pub(crate) struct Turn<T> {
    pub(crate) id: u64,
    /// Which picture of the job.
    pub(crate) picture: usize,
    /// The job, with its first picture.
    pub(crate) item: Option<T>,
}

impl<T> FairQueue<T> {
    pub(crate) fn new() -> Self {
        Self {
            entries: Vec::new(),
            now: 0.0,
            arrivals: 0,
        }
    }

    /// Pictures that wait.
    pub(crate) fn pictures(&self) -> usize {
        self.entries.iter().map(|e| e.pictures - e.next).sum()
    }

    /// The work that waits, in the unit of `cost`.
    pub(crate) fn cost(&self) -> f64 {
        let left = |e: &Entry<T>| (e.pictures - e.next) as f64 * e.cost;
        self.entries.iter().map(left).sum()
    }

    /// Adds a job of `pictures` pictures, each of which costs `cost`.
    pub(crate) fn push(&mut self, id: u64, item: T, pictures: usize, cost: f64) {
        if pictures == 0 {
            return;
        }
        self.arrivals += 1;
        self.entries.push(Entry {
            id,
            item: Some(item),
            next: 0,
            pictures,
            cost,
            tag: self.now,
            arrival: self.arrivals,
        });
    }

    /// The next picture.
    pub(crate) fn pop(&mut self) -> Option<Turn<T>> {
        let share = self.entries.len() as f64;
        let order = |e: &Entry<T>| (e.tag, e.arrival);
        let at = (0..self.entries.len()).min_by(|a, b| {
            let (a, b) = (order(&self.entries[*a]), order(&self.entries[*b]));
            a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
        })?;
        let entry = &mut self.entries[at];
        let turn = Turn {
            id: entry.id,
            picture: entry.next,
            item: entry.item.take(),
        };
        self.now = self.now.max(entry.tag) + entry.cost / share;
        entry.next += 1;
        entry.tag += entry.cost;
        if entry.next == entry.pictures {
            self.entries.remove(at);
        }
        Some(turn)
    }

    /// Takes a job out; whether it was there.
    pub(crate) fn remove(&mut self, id: u64) -> bool {
        let before = self.entries.len();
        self.entries.retain(|e| e.id != id);
        self.entries.len() < before
    }

    /// Jobs none of whose pictures has had its turn, next one first.
    pub(crate) fn waiting(&self) -> Vec<u64> {
        let mut untouched: Vec<&Entry<T>> =
            self.entries.iter().filter(|e| e.item.is_some()).collect();
        untouched.sort_by(|a, b| a.tag.total_cmp(&b.tag).then(a.arrival.cmp(&b.arrival)));
        untouched.into_iter().map(|e| e.id).collect()
    }

    /// Takes everything out.
    pub(crate) fn clear(&mut self) -> Vec<u64> {
        self.entries.drain(..).map(|e| e.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(queue: &mut FairQueue<()>) -> Vec<(u64, usize)> {
        std::iter::from_fn(|| queue.pop().map(|turn| (turn.id, turn.picture))).collect()
    }

    #[test]
    fn equal_jobs_come_in_order() {
        let mut queue = FairQueue::new();
        (1..=4).for_each(|id| queue.push(id, (), 1, 20.0));
        assert_eq!(queue.waiting(), [1, 2, 3, 4]);
        assert_eq!((queue.pictures(), queue.cost()), (4, 80.0));
        assert!(queue.remove(3) && !queue.remove(3));
        assert_eq!(order(&mut queue), [(1, 0), (2, 0), (4, 0)]);
    }

    #[test]
    fn a_small_job_does_not_wait_for_all_of_a_large_one() {
        let mut queue = FairQueue::new();
        queue.push(1, (), 10, 40.0);
        assert_eq!(queue.pop().unwrap().picture, 0);
        queue.push(2, (), 1, 40.0);
        queue.push(3, (), 2, 40.0);
        let order = order(&mut queue);
        let place = |id| order.iter().position(|turn| *turn == (id, 0)).unwrap();
        assert!(place(2) <= 1 && place(3) <= 2, "{order:?}");
        assert_eq!(order.last(), Some(&(1, 9)));
    }

    #[test]
    fn a_large_job_does_not_starve() {
        let mut queue = FairQueue::new();
        queue.push(0, (), 10, 40.0);
        // Always three small ones waiting, for ever.
        let mut next = 1;
        let mut large = 0;
        for _ in 0..40 {
            while queue.pictures() < 3 + (10 - large) {
                queue.push(next, (), 1, 40.0);
                next += 1;
            }
            large += usize::from(queue.pop().unwrap().id == 0);
        }
        assert!(
            large >= 8,
            "{large} of 10 pictures after 40 turns of 4 jobs"
        );
    }

    #[test]
    fn the_job_leaves_with_its_first_picture() {
        let mut queue = FairQueue::new();
        queue.push(5, "job", 2, 1.0);
        assert_eq!(queue.pop().unwrap().item, Some("job"));
        assert!(queue.waiting().is_empty());
        assert_eq!(queue.clear(), [5]);
        assert_eq!(queue.pop(), None);
    }
}
