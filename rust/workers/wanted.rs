//! Who wants a worker to be there.
//!
//! One worker may be named by its URL and be an address of several names of the DNS. It stays as long as one of them
//! wants it, unless it is told to leave.

/// Who wants a worker.
#[derive(Clone, Copy, Debug)]
pub(super) enum WantedBy {
    /// An option or a request that names its URL. To say so again changes nothing.
    Url,
    /// A name that has its address. Each of them counts.
    Name,
}

/// Those who want one worker.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    by_url: bool,
    by_names: u32,
}

impl Wanted {
    pub(super) fn add(&mut self, by: WantedBy) {
        match by {
            WantedBy::Url => self.by_url = true,
            WantedBy::Name => self.by_names += 1,
        }
    }

    /// A name that wanted it has lost its address. Returns whether nobody wants it any more.
    pub(super) fn lost_by_name(&mut self) -> bool {
        self.by_names = self.by_names.saturating_sub(1);
        self.by_names == 0 && !self.by_url
    }
}
