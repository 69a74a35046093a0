//! The two ends of a listing.

use super::Invalid;
use crate::types;

const PAGE_SIZE: u32 = 100;
const MAX_PAGE_SIZE: u32 = 500;

/// Which page is asked for, with the defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListRequest {
    /// Without it the full list is wanted.
    pub since: Option<types::Cursor>,
    /// 1 to 500.
    pub page_size: u32,
    /// Empty for the first page.
    pub page_token: String,
}

impl TryFrom<Option<types::ListOptions>> for ListRequest {
    type Error = Invalid;

    fn try_from(options: Option<types::ListOptions>) -> Result<Self, Invalid> {
        let options = options.unwrap_or_default();
        let page_size = match options.page_size {
            0 => PAGE_SIZE,
            size @ 1..=MAX_PAGE_SIZE => size,
            size => {
                let reason = format!("is {size}, wanted at most {MAX_PAGE_SIZE}");
                return Err(Invalid::new("options.page_size", reason));
            }
        };
        Ok(Self { since: options.since, page_size, page_token: options.page_token })
    }
}
